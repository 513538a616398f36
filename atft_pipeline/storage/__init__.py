"""Files that are written whole or not at all, artifacts with a manifest, and the hash of the code that made them."""
