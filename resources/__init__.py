"""What touches the outside world: paths, the environment, devices."""
