"""The 82 features: a vocabulary (expressions), the market they look at (market), one row each (registry), the panel."""
