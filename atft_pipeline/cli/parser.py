"""The parser of `atft`. A new command is registered in the module of its group, and nowhere else."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from atft_pipeline import __version__
from atft_pipeline.cli import data, diagnosis, judging, training, watching
from atft_pipeline.cli.reply import Reply

GROUPS = (data, training, judging, diagnosis, watching)
"""Modules of commands, in the order of the help."""


class Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def atft_parser() -> argparse.ArgumentParser:
    """The parser. Its options hold `command`, the function to call, and `name`, the command as it was typed."""
    parser = Parser(prog="atft", description="Raw daily quotes to a gated ATFT-GAT-FAN model, on the command line.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND", parser_class=Parser)

    def add(
        name: str, run: Callable[[argparse.Namespace], Reply], text: str, *, aliases: Sequence[str] = ()
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, aliases=list(aliases))
        command.set_defaults(command=run)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        return command

    for group in GROUPS:
        group.register(add)
    return parser
