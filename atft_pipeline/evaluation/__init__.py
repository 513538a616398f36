"""What scores are worth: portfolios, metrics, baselines, attribution."""
