"""Runs while they train and side by side: progress, warnings, dashboard, comparison."""
