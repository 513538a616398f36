"""The only code that knows where sources come from and where outputs lie.

An artifact's name contains its fingerprint, so an interrupted or failed command leaves earlier artifacts as they were.
A link per kind points at the newest complete artifact. Runs are never linked.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from atft_pipeline.config.schema import DatasetConfig
from atft_pipeline.errors import InputError
from atft_pipeline.market import synthetic
from atft_pipeline.market.sources import Source, open_source
from atft_pipeline.storage.artifact import read_manifest, sha256_of
from atft_pipeline.storage.atomic import relink, replacing, write_json
from atft_pipeline.storage.monthly import move_artifact

EMBEDDED_STOCKS, EMBEDDED_SESSIONS, EMBEDDED_SEED = 200, 750, 0
"""Size and seed of the synthetic market that is used where no source is named."""

SOURCE_VARIABLE = "ATFT_SOURCE"

LINKS = {
    "prices": "prices_latest.parquet",
    "ml_dataset": "ml_dataset_latest_full.parquet",
    "stock_graph": "stock_graph_latest.parquet",
}


class OutputFolders(dg.ConfigurableResource):
    """Sources, datasets and runs of this checkout."""

    output: str = "output"
    """Folder of all outputs, relative to the checkout."""
    source: str | None = None
    """Source folder; if not set, the environment's ATFT_SOURCE; without either, the embedded market."""

    @property
    def datasets(self) -> Path:
        return Path(self.output) / "datasets"

    @property
    def runs(self) -> Path:
        return Path(self.output) / "runs"

    @property
    def exports(self) -> Path:
        return Path(self.output) / "exports"

    # Sources ---------------------------------------------------------------------------------------------------

    def named_source(self) -> Path | None:
        """The folder that config or environment names, if any."""
        name = self.source or os.environ.get(SOURCE_VARIABLE)
        return Path(name) if name else None

    def open_source(self, path: str | None = None) -> Source:
        """Opens the source at `path`, else the named one, else the embedded market, which is generated on first use."""
        return open_source(path or self.named_source() or self.embedded_market())

    def embedded_market(self) -> Path:
        """Folder of the embedded market, generated on first use and again when the generator's code changes."""
        recipe = [EMBEDDED_STOCKS, EMBEDDED_SESSIONS, EMBEDDED_SEED, Path(synthetic.__file__).read_text("utf-8")]
        folder = self.datasets / f"synthetic_market_{sha256_of(recipe)[:12]}"
        if not folder.exists():
            with replacing(folder) as temporary:
                synthetic.write_market(
                    temporary, stocks=EMBEDDED_STOCKS, sessions=EMBEDDED_SESSIONS, seed=EMBEDDED_SEED
                )
        return folder

    def is_embedded(self, source: Path | str) -> bool:
        """Whether `source`, for example a manifest's, is the embedded market."""
        return Path(source).resolve().parent == self.datasets.resolve()

    # Artifacts -------------------------------------------------------------------------------------------------

    def product(self, kind: str, fingerprint: str) -> Path:
        """Where the artifact `kind` of this fingerprint lies: a folder of months."""
        return self.datasets / f"{kind}_{fingerprint[:16]}"

    def publish(self, kind: str, path: Path) -> None:
        """Points the link of `kind` at the complete artifact `path`."""
        relink(self.datasets / LINKS[kind], path)

    def current(self, kind: str, asset: str) -> tuple[Path, dict[str, Any]]:
        """The newest complete artifact and its manifest.

        asset: who reads it, named in messages. Raises InputError when there is none, when its manifest is of another
        kind, or when ATFT_SOURCE names another source than its manifest.
        """
        link = self.datasets / LINKS[kind]
        if not link.exists():
            raise InputError(
                f"{asset}: there is no {kind} yet ({link}); run `dagster asset materialize --select '+key:{asset}'`"
            )
        path = self.datasets / link.readlink()
        manifest = read_manifest(path, kind=kind)
        self._refuse_other_source(asset, manifest)
        return path, manifest

    def _refuse_other_source(self, asset: str, manifest: dict[str, Any]) -> None:
        named = self.named_source()
        made_from = Path(manifest["source"]["path"])
        if named is not None and named.resolve() != made_from.resolve():
            raise InputError(
                f"{asset}: {SOURCE_VARIABLE} is {named}, but its inputs were made from {made_from}; unset the variable,"
                f" or run `dagster asset materialize --select '+key:{asset}'` to rebuild them from {named}"
            )

    def previous(self, kind: str) -> Path | None:
        """The newest complete artifact, from any source; a new version may continue it."""
        link = self.datasets / LINKS[kind]
        return self.datasets / link.readlink() if link.exists() else None

    def building(self, kind: str) -> Path:
        """Where an artifact is built before its fingerprint is known."""
        return self.datasets / f".{kind}_building"

    def keep(self, kind: str, fingerprint: str) -> Path:
        """Moves the built artifact to the name with its fingerprint."""
        path = self.product(kind, fingerprint)
        move_artifact(self.building(kind), path)
        return path

    # Baselines -------------------------------------------------------------------------------------------------

    @property
    def _baselines_link(self) -> Path:
        return self.datasets / "baselines_latest.json"

    def keep_baselines(self, content: Mapping[str, Any]) -> Path:
        """Stores the figures of the baselines under the hash of what decides them, and links to them as the newest."""
        from atft_pipeline.monitoring.comparison import BASELINES_KIND

        decided_by = {name: content[name] for name in ("dataset_fingerprint", "split", "evaluation", "seed")}
        path = self.datasets / f"baselines_{sha256_of(decided_by)[:16]}.json"
        write_json(path, {"kind": BASELINES_KIND, **content})
        relink(self._baselines_link, path)
        return path

    def baselines(self) -> dict[str, Any] | None:
        """The newest stored figures, for any dataset and split; None if there are none."""
        from atft_pipeline.monitoring.comparison import read_baselines

        return read_baselines(self._baselines_link) if self._baselines_link.exists() else None

    @staticmethod
    def dataset_config(manifest: dict[str, Any]) -> DatasetConfig:
        """The dataset configuration with which an artifact was made."""
        return DatasetConfig(**manifest["config"])
