"""What a run earned: evaluation, checks, baselines, comparison, ensemble scores."""
