"""A diagnosis as a person reads it."""
