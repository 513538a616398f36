"""The cross-sectional stock graph: which stocks read each other's state."""
