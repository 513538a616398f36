"""The 82 features: the words they are written in (vocabulary), what they read (inputs), one row each (registry)."""
