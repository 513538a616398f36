"""Build hook: installs one `.pth` line beside the package, in wheels and in editable installs.

`dagster asset materialize --select X` reads neither pyproject.toml nor workspace.yaml; it takes its module from an
environment variable. The line sets that variable's default when the interpreter starts, and an exported value wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PTH_NAME = "atft_pipeline_dagster_default.pth"


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        source = str(Path(self.root) / PTH_NAME)
        target = "force_include_editable" if version == "editable" else "force_include"
        build_data[target][source] = PTH_NAME
