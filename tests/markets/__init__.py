"""Markets that several tests look at: a generated one, one full of events, and one for the graph."""
