"""What the models learn from a market whose answer is known, and from the years of a source."""
