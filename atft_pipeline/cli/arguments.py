"""Options that several commands share: preset, overrides and environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from atft_pipeline.cli.reply import Reply
from atft_pipeline.config.presets import PRESETS
from atft_pipeline.config.schema import PipelineConfig

DEFAULT_PRESET = "cpu"
DEVICES = "auto, cpu, cuda or cuda:N (default: %(default)s)"


class AddCommand(Protocol):
    """Registers the command `name`; `run` carries it out. `aliases` are older names that scripts still use."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], Reply], text: str, *, aliases: Sequence[str] = ()
    ) -> argparse.ArgumentParser: ...


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """`--preset` and `--set`, which `configuration` reads."""
    *others, last = PRESETS
    names = f"{', '.join(others)} or {last}"
    parser.add_argument("--preset", default=DEFAULT_PRESET, help=f"{names} (default: %(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. train.optimizer.lr=1e-3"
    )


def configuration(options: argparse.Namespace, *sections: str) -> tuple[PipelineConfig, dict[str, Any]]:
    """The configuration of a command that reads `sections`, and its overrides. Raises InputError like `configured`."""
    from atft_pipeline.config.overrides import configured, parse_assignments

    assigned = parse_assignments(options.set)
    return configured(options.preset, assigned, environment(), sections=sections, reader=f"`atft {options.name}`")


def environment() -> Mapping[str, str]:
    """The environment variables of the command."""
    return os.environ
