"""The run directory: its keys, its tables, its state, one writer and one reader."""
