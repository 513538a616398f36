"""Short experiments that confirm or refute a cause."""
