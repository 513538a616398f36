"""Faults planted into real runs, and whether the diagnosis names them."""
