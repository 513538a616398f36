"""The run directory: its keys, its tables, one writer and one reader."""
