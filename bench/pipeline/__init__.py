"""The whole pipeline: time and memory of each stage, and of an appended session."""
