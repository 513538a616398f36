"""The runs of an ensemble, and their predictions as panels."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from atft_pipeline.config.overrides import from_dict, leaves
from atft_pipeline.config.schema import HORIZONS, PipelineConfig
from atft_pipeline.ensemble.combine import Scores, standardised
from atft_pipeline.errors import InputError
from atft_pipeline.runs.documents import read_verdict
from atft_pipeline.runs.header import read_run
from atft_pipeline.runs.keys import NON_DECIDING_FIELDS
from atft_pipeline.storage.artifact import (
    read_artifact,
)


@dataclass(frozen=True)
class FinishedRun:
    """A run whose scores may be combined and exported."""

    run_dir: Path
    header: dict[str, Any]
    config: PipelineConfig
    verdict: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def epochs(self) -> int:
        return int(self.header["epochs_done"])

    @property
    def predictions(self) -> Path:
        """Scores of the last epoch."""
        return self.run_dir / "predictions" / f"epoch_{self.epochs:03d}.parquet"

    def identity(self) -> dict[str, Any]:
        """What ties ensemble scores to this run."""
        with self.predictions.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "name": self.run_dir.name,
            "key": self.header["key"],
            "seed": self.seed,
            "epochs": self.epochs,
            "weights_hash": self.verdict["weights_hash"],
            "predictions_sha256": digest,
            "verdict": self.verdict["status"],
        }


def read_finished_run(run_dir: Path) -> FinishedRun:
    """The run in `run_dir`; raises InputError where it is not finished or its verdict is invalid."""
    header = read_run(run_dir)
    if header["status"] != "finished":
        raise InputError(f"run directory {run_dir}: it is {header['status']!r}, not finished; start it again first")
    verdict = read_verdict(run_dir)
    if verdict["status"] == "invalid":
        raise InputError(f"run directory {run_dir}: its verdict is invalid ({verdict['summary']}); use another run")
    return FinishedRun(run_dir, header, from_dict(header["config"]), verdict)


def read_ensemble(run_dirs: Sequence[Path]) -> list[FinishedRun]:
    """The runs by ascending seed.

    Raises InputError where one cannot be exported, where two have the same seed, and where they differ in anything
    but the seed, naming the field.
    """
    runs = sorted((read_finished_run(run_dir) for run_dir in run_dirs), key=lambda run: run.seed)
    for earlier, later in itertools.pairwise(runs):
        if earlier.seed == later.seed:
            raise InputError(
                f"run directory {later.run_dir}: train.seed is {later.seed} as in {earlier.run_dir}; an ensemble takes"
                " runs of different seeds"
            )
        mine, other = _decisive_fields(later), _decisive_fields(earlier)
        for field in sorted(mine.keys() | other.keys()):
            if mine.get(field) != other.get(field):
                raise InputError(
                    f"run directory {later.run_dir}: {field} is {mine.get(field)!r}, but {other.get(field)!r} in"
                    f" {earlier.run_dir}; an ensemble takes runs that differ in train.seed alone"
                )
    return runs


def _decisive_fields(run: FinishedRun) -> dict[str, Any]:
    """Everything that decides a run, by dotted name, but for its seed."""
    fields = leaves(run.header["config"])
    for name in ("seed", *NON_DECIDING_FIELDS):
        del fields[f"train.{name}"]
    named = ("dataset_fingerprint", "graph_fingerprint", "code_revision")
    return fields | {name: run.header[name] for name in named} | {"processes": run.header.get("processes", 1)}


class Predictions:
    """The rows of a run's predictions as panels and back."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        days = pc.cast(table["Date"], pa.date32())
        self.sessions, self._t = np.unique(days.to_numpy().astype("datetime64[D]"), return_inverse=True)
        codes = pc.dictionary_encode(table["Code"].combine_chunks())
        names = np.asarray(codes.dictionary.to_pylist(), dtype=np.str_)
        order = np.argsort(names)
        self.codes = names[order]
        self._n = np.argsort(order)[codes.indices.to_numpy()]

    def panel(self, name: str) -> Scores:
        """A numeric column [T, N], NaN where there is no row."""
        return self._placed(pc.cast(self.table[name], pa.float64()).to_numpy(), np.nan)

    @cached_property
    def member(self) -> NDArray[np.bool_]:
        return self._placed(np.ones(self.table.num_rows, bool), False)

    @property
    def investable(self) -> NDArray[np.bool_]:
        """Every row: a model scores investable stocks and no others."""
        return self.member

    @cached_property
    def liquid(self) -> NDArray[np.bool_]:
        return self._placed(self.table["is_liquid"].to_numpy(), False)

    def of_split(self, split: str) -> NDArray[np.bool_]:
        """[T] sessions of the split."""
        rows = pc.equal(self.table["split"], split).to_numpy()
        return np.asarray(self._placed(rows, False).any(axis=1), bool)

    def rows(self, panel: Scores) -> NDArray[np.float32]:
        """A panel as a column of the table."""
        return panel[self._t, self._n].astype(np.float32)

    def _placed(self, values: NDArray[Any], elsewhere: Any) -> NDArray[Any]:
        out = np.full((len(self.sessions), len(self.codes)), elsewhere, dtype=values.dtype)
        out[self._t, self._n] = values
        return out


def read_predictions(runs: Sequence[FinishedRun], column: str) -> tuple[Predictions, dict[str, Scores]]:
    """The rows that all runs scored, and the scores of each by `seed_K`. Raises InputError where the rows differ."""
    keys = ["Date", "Code", "split", "is_liquid"]
    needed = [*keys, column, *(f"target_{h}d" for h in HORIZONS)]
    rows = Predictions(read_artifact(runs[0].predictions, needed))
    members: dict[str, Scores] = {}
    for run in runs:
        table = read_artifact(run.predictions, needed)
        if not table.select(keys).equals(rows.table.select(keys)):
            raise InputError(
                f"{run.predictions}: has other rows than {runs[0].predictions}; train one of the two runs again"
            )
        members[f"seed_{run.seed}"] = standardised(Predictions(table).panel(column))
    return rows, members
