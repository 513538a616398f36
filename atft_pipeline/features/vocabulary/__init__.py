"""The words that features are written in, by what they look at: one value, a window, a session, an event."""
