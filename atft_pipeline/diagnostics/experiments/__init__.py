"""The experiments A to D, and the commands that a diagnosis names."""
