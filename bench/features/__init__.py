"""Features beside those of other libraries."""
