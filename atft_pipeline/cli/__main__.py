"""`python -m atft_pipeline.cli`: the command where it is not installed as a script, e.g. under torchrun."""

from atft_pipeline.cli.main import script

script()
