"""The inputs of a run. Each is read once, and only if its fingerprint is still the one in the run's record."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atft_pipeline.config.overrides import from_dict
from atft_pipeline.config.schema import HORIZONS, PipelineConfig
from atft_pipeline.config.slices import SLICES
from atft_pipeline.dataset.layout import membership_path
from atft_pipeline.dataset.splits import Split, make_split
from atft_pipeline.errors import InputError
from atft_pipeline.inspection.reader import Record, read_scores
from atft_pipeline.storage.artifact import read_manifest, resolved
from atft_pipeline.training.telemetry.input_sample import SCHEMA as SAMPLE

if TYPE_CHECKING:
    from atft_pipeline.batches.block_dataset import BlockDataset
    from atft_pipeline.batches.panel import Panel
    from atft_pipeline.model.atft_gat_fan import ATFTGATFAN


class RunInputs:
    """Configuration, dataset, split, graph and model of the run in `record`.

    Every property raises InputError where its file cannot be read or has been replaced since the run.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self._registered: list[str] = []

    @cached_property
    def config(self) -> PipelineConfig:
        config = self.record.run.get("config")
        if not isinstance(config, dict):
            raise InputError("run.json does not hold the configuration")
        return from_dict(config)

    @cached_property
    def dataset(self) -> Path:
        return self._of_the_run("dataset", "ml_dataset")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_manifest(self.dataset, "ml_dataset")

    @cached_property
    def graph(self) -> Path:
        return self._of_the_run("graph", "stock_graph")

    @property
    def unusable(self) -> list[str]:
        """Why configuration, split or graph cannot be used. Rules that need them are not assessable."""
        reasons = []
        for what in ("config", "split", "graph"):
            if what == "graph" and not self.record.config("model.graph"):
                continue
            try:
                getattr(self, what)
            except (InputError, OSError, duckdb.Error) as error:
                reasons.append((str(error).splitlines() or [type(error).__name__])[0])
        return list(dict.fromkeys(reasons))

    def _of_the_run(self, what: str, kind: str) -> Path:
        path = Path(str(self.record.run.get(f"{what}_path")))
        if read_manifest(path, kind).get("fingerprint") != self.record.run.get(f"{what}_fingerprint"):
            raise InputError(f"{path}: not the {what} that the run was trained on")
        return path

    @cached_property
    def rows(self) -> str:
        """Files of features and targets, as a pattern."""
        return _pattern(resolved(self.dataset))

    @cached_property
    def members(self) -> str:
        """Files of the membership, as a pattern."""
        return _pattern(membership_path(self.dataset))

    @property
    def universe(self) -> str:
        """Column of the membership that marks the stocks the run is trained on."""
        return SLICES[self.config.train.universe]

    @cached_property
    def sessions(self) -> NDArray[np.datetime64]:
        """[T] sessions with a row, as in a panel; the manifest also lists sessions on which nothing traded."""
        query = "SELECT DISTINCT Date FROM read_parquet(?) ORDER BY 1"
        dates = duckdb.execute(query, [self.members]).fetchnumpy()["Date"]
        return np.asarray(dates, "datetime64[D]")

    @cached_property
    def split(self) -> Split:
        return make_split(self.sessions, self.config.split)

    # Tables in the record's connection -------------------------------------------------------------------------------

    @cached_property
    def validation_scores(self) -> tuple[int, pa.Table]:
        """Epoch and rows of the newest predictions with validation rows; registers them as the relation `scored`."""
        for epoch in sorted(self.record.predictions, reverse=True):
            table = read_scores(self.record.predictions[epoch], HORIZONS)
            rows = None if table is None else table.filter(pc.equal(table["split"], "validation"))
            if rows is not None and rows.num_rows:
                self._register("scored", rows)
                return epoch, rows
        raise InputError("no readable predictions of validation sessions")

    @cached_property
    def sample(self) -> pa.Table:
        """The model's inputs in the sampled sessions (`inputs.parquet`); registers them as the relation `given`."""
        try:
            table = pq.read_table(self.record.run_dir / "inputs.parquet").select(SAMPLE.names).cast(SAMPLE)
        except (OSError, pa.ArrowException, KeyError) as error:
            raise InputError(f"inputs.parquet: not readable ({type(error).__name__})") from error
        if not table.num_rows:
            raise InputError("inputs.parquet: no rows")
        self._register("given", table)
        return table

    def require_scores(self) -> None:
        """Registers the relation `scored`. Raises InputError where no predictions can be read."""
        _ = self.validation_scores

    def require_sample(self) -> None:
        """Registers the relation `given`. Raises InputError where the sample cannot be read."""
        _ = self.sample

    def _register(self, name: str, table: pa.Table) -> None:
        self.record.connection.register(name, table)
        self._registered.append(name)

    def forget_tables(self) -> None:
        """Removes `scored` and `given` from the connection, which outlives these inputs."""
        while self._registered:
            self.record.connection.unregister(self._registered.pop())

    # For probes that compute with the model ------------------------------------------------------------------------

    @cached_property
    def panel(self) -> Panel:
        from atft_pipeline.batches.panel import load_panel

        return load_panel(self.dataset, self.config.train.universe)

    @cached_property
    def blocks(self) -> BlockDataset:
        from atft_pipeline.batches.block_dataset import BlockDataset
        from atft_pipeline.graph.store import load_graph

        graph = load_graph(self.graph) if self.config.model.graph else None
        return BlockDataset(self.panel, graph, self._new_model().receptive_field)

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """Epoch -> file of the weights that were evaluated, ascending."""
        files = sorted((self.record.run_dir / "checkpoints").glob("epoch_*.pt"))
        return {int(path.stem.removeprefix("epoch_")): path for path in files}

    def model(self, epoch: int) -> ATFTGATFAN:
        """The network of this code with the weights of an epoch's checkpoint."""
        from atft_pipeline.training.checkpoints import read_checkpoint

        model = self._new_model()
        this_run = {"run_key": self.record.run.get("key")}
        model.load_state_dict(read_checkpoint(self.checkpoints[epoch], this_run)["weights"])
        return model

    def _new_model(self) -> ATFTGATFAN:
        from atft_pipeline.model.atft_gat_fan import ATFTGATFAN

        return ATFTGATFAN(self.config.model, len(self.panel.feature_names))

    def scores(self, model: ATFTGATFAN) -> NDArray[np.float64]:
        """[T, N] of horizon 1 on the validation sessions, NaN outside the universe."""
        import torch

        from atft_pipeline.training.judging.scoring import score_sessions

        scores = score_sessions(
            model,
            self.blocks,
            self.split.validation,
            batch_size=self.config.train.batch_size,
            device=torch.device("cpu"),
        )
        return scores.values[:, :, 0].astype(np.float64)

    @property
    def targets(self) -> NDArray[np.float64]:
        """[T, N] of horizon 1 on the validation sessions."""
        targets: NDArray[np.float64] = self.panel.targets[self.split.validation, :, 0].astype(np.float64)
        return targets


def _pattern(path: Path) -> str:
    return str(path / "*.parquet") if path.is_dir() else str(path)
