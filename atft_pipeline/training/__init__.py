"""The trainer, its losses and schedule, and the processes that share one run."""
