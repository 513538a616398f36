"""Files that are written whole or not at all, artifacts with a manifest, and which code made them."""
