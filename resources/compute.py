"""The machine of a training run: device, threads, processes, and the preset that fits them.

Here and in `assets/`, torch and matplotlib are imported where they are used. Otherwise a command that only starts steps
in other processes would wait seconds for them.
"""

import os
from collections.abc import Mapping
from typing import Any

import dagster as dg

from atft_pipeline.config.overrides import configured
from atft_pipeline.config.schema import PipelineConfig

PRESET_VARIABLE = "ATFT_PRESET"


class Compute(dg.ConfigurableResource):
    """Device, threads, processes and preset of the runs started here."""

    device: str = "auto"
    """auto (CUDA where present), cpu, cuda or cuda:N."""
    threads: int = 0
    """Torch threads; 0 means torch's default."""
    processes: int = 0
    """Processes that train one run together; 0 means the environment's ATFT_PROCESSES, else one."""
    preset: str | None = None
    """quick, cpu or production; if not set, the environment's ATFT_PRESET."""

    def configuration(
        self, asset: str, *, sections: tuple[str, ...], embedded: bool, overrides: Mapping[str, Any]
    ) -> tuple[PipelineConfig, dict[str, Any]]:
        """The configuration that `asset` uses, and the overrides that it contains.

        sections: those that the asset reads. The run config takes precedence over the report's variables in the
        environment. Without a preset: `quick` for the embedded market, `production` where CUDA is present, else `cpu`.
        Raises InputError as `configured` does.
        """
        name = self.preset or os.environ.get(PRESET_VARIABLE) or self._default_preset(embedded)
        return configured(name, overrides, os.environ, sections=sections, reader="this asset", where=f"{asset}: ")

    @staticmethod
    def _default_preset(embedded: bool) -> str:
        if embedded:
            return "quick"
        import torch

        return "production" if torch.cuda.is_available() else "cpu"

    def process_count(self) -> int:
        """How many processes train one run; raises InputError when the setting is no such number."""
        from atft_pipeline.training.launcher import Layout, processes_asked

        return Layout(self.processes or processes_asked(os.environ)).processes

    def threads_each(self, processes: int) -> int:
        """Torch threads of each of several processes; 0 means torch's default."""
        from atft_pipeline.training.launcher import threads_each

        return self.threads or threads_each(os.environ, processes)

    def apply_threads(self) -> None:
        if self.threads > 0:
            import torch

            torch.set_num_threads(self.threads)
