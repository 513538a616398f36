"""The experiments A to D: what each changes, and whether a run's evidence asks for it."""
