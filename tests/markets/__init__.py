"""Markets that several tests use: a generated one, one full of events, and one for the graph."""
