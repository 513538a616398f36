"""Runs while they go on: progress, warnings, dashboard, comparison."""
