"""A refresh of the graph against brute force."""
