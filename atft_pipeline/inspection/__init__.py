"""Finished records read again: one reader, two runs compared, where returns come from. Decides no result."""
