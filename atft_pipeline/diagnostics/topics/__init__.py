"""One module per topic of a diagnosis: what is measured, and which rules read it."""
