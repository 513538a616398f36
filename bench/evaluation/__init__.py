"""What the models learn: of a market whose answer is known, and over the years of a source."""
