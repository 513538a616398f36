"""The command `atft`."""

from atft_pipeline.cli.command import main, script

__all__ = ["main", "script"]
