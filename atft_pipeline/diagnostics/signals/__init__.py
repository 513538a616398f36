"""Named figures of one run, each a number or None where it was not measured."""
