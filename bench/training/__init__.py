"""Speed of training, on this machine and on a GPU, and the cost of its record."""
