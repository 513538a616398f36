"""One training op per run length, its gate, and the processes that share a run."""
