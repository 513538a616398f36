"""The command `atft`: a module per group of subcommands, which registers them with the parser."""

from atft_pipeline.cli.main import main, script

__all__ = ["main", "script"]
