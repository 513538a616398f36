"""Faults that are planted into real runs, and whether the diagnosis names them."""
