"""One run in several processes, and how each of them is interrupted."""
