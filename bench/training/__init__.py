"""Speed of training, on this machine and on a GPU, and what its record costs."""
