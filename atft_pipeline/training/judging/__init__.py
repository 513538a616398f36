"""What a run is judged by: scores after each epoch, what they earn, the validity checks, and the verdict at the end."""
