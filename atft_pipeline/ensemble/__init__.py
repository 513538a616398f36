"""One score of several runs: averaged, blended, smoothed."""
