"""Our features compared with those of other libraries."""
