"""Features and targets on disk, and the split of their sessions."""
