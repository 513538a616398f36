"""The functions that features are written in, by what they look at: a value, a window, a session, a publication."""
