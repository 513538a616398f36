"""The dense panel of a dataset, and the session blocks that training reads."""
