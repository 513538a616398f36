"""A refresh of the graph compared with brute force."""
