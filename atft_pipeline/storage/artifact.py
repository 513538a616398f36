"""An artifact on disk: a parquet file or a folder of partitions, with a manifest beside it that is written last.

`PATH` is a parquet file, or a folder of one partition per month; beside it lies `PATH.manifest.json`. Data without a
manifest are no artifact. Training reads through this module, so the module needs pyarrow and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from atft_pipeline.errors import InputError
from atft_pipeline.storage.atomic import replacing, write_json

Period = tuple[date, date]
"""First and last day."""


def resolved(path: Path) -> Path:
    """`path` with every link followed: sidecars lie beside the data, not beside a link to it."""
    return Path(path).resolve()


def manifest_path(path: Path) -> Path:
    """Where the manifest of the artifact at `path` lies."""
    data = resolved(path)
    return data.with_name(f"{data.name}.manifest.json")


def sha256_of(value: Any) -> str:
    """Hash of a JSON value, the same for any key order. Raises TypeError or ValueError for what JSON cannot hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Manifest(dict[str, Any]):
    """A manifest as read from `file`; reading a missing entry raises an InputError that names the entry."""

    def __init__(self, entries: dict[str, Any], file: Path, path: Path) -> None:
        super().__init__(entries)
        self._file, self._path = file, path

    def __missing__(self, entry: str) -> Any:
        raise InputError(f"{self._file}: entry {entry!r} is missing; build {self._path} again")


def read_manifest(path: Path, kind: str | None = None) -> Manifest:
    """The manifest of the artifact at `path`.

    Raises: InputError when there is none, when it is not a JSON object, or when its `kind` is not the one asked for.
    """
    file = manifest_path(path)
    if not file.is_file():
        raise InputError(f"{path}: no manifest {file}; build it again, an interrupted or foreign file has none")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not a readable JSON manifest ({error}); build {path} again") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(manifest).__name__}; build {path} again")
    if kind is not None and manifest.get("kind") != kind:
        raise InputError(f"{file}: expected kind {kind!r}, found {manifest.get('kind')!r}; give the path of a {kind}")
    return Manifest(manifest, file, path)


def require_replaceable(path: Path, kind: str, sidecars: Sequence[str] = ()) -> None:
    """Refuses an output that would replace something else: a source table, another artifact, a folder of files.

    sidecars: names of what is written beside the artifact, as `PATH.<name>`.

    Raises: InputError when `path` exists and has no manifest of `kind`, or when a sidecar exists without an artifact.
    """
    data = resolved(path)
    if not data.exists():
        taken = next((file for name in sidecars if (file := data.with_name(f"{data.name}.{name}")).exists()), None)
        if taken is not None:
            raise InputError(f"{taken}: exists and belongs to no {kind}; choose another name, or remove it first")
        return
    try:
        read_manifest(path, kind)
    except InputError as refusal:
        what = "a folder" if data.is_dir() else "a file"
        raise InputError(
            f"{path}: exists and is {what} that is no {kind} with a manifest; choose another name, or remove it first"
        ) from refusal


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of the artifact at `path`, whole or not at all."""
    write_json(manifest_path(path), manifest)


@contextmanager
def replacing_artifact(path: Path) -> Iterator[Path]:
    """`atomic.replacing` for the data of an artifact, file or folder; the earlier manifest is deleted with its data.

    Without its manifest an artifact does not exist, so no kill can pair new data with an old manifest.
    """
    data = resolved(path)
    with replacing(data) as temporary:
        yield temporary
        manifest_path(data).unlink(missing_ok=True)
        if temporary.is_dir() and data.is_file():
            data.unlink()  # a folder cannot be renamed onto a file


def read_artifact(path: Path, columns: Sequence[str] | None = None, period: Period | None = None) -> pa.Table:
    """Rows of the artifact at `path` (a file, or a folder of partitions in name order), with `columns` in that order.

    With `period`, it reads only the rows of these days and skips row groups without any.

    Raises: InputError when it is missing, not parquet, or lacks a column.
    """
    data = resolved(path)
    files = sorted(data.glob("*.parquet")) if data.is_dir() else [data]
    if not files or not files[0].exists():
        raise InputError(f"{path}: no such parquet file or folder of parquet partitions; build it first")
    names = None if columns is None else list(columns)
    tables = [read_partition(file, names, period) for file in files]
    for file, table in zip(files, tables, strict=True):
        if not table.schema.equals(tables[0].schema):
            raise InputError(f"{path}: {file.name} has other columns or types than {files[0].name}; make them alike")
    return pa.concat_tables(tables)


def write_partition(path: Path, table: pa.Table) -> None:
    """Writes rows to one parquet file."""
    # Floats hardly compress, so a dictionary only costs time for them; Date and Code compress well. zstd saves 8 % of
    # lz4's size and takes three times as long.
    pq.write_table(table, path, compression="lz4", use_dictionary=_repetitive(table))


def _repetitive(table: pa.Table) -> list[str]:
    return [column.name for column in table.schema if not pa.types.is_floating(column.type)]


def read_partition(file: Path, columns: list[str] | None = None, period: Period | None = None) -> pa.Table:
    """Rows of one parquet file, all or those of `period`. Raises: InputError if it is unreadable or lacks a column."""
    with readable(file), pq.ParquetFile(file) as parquet:
        missing = sorted(set(columns or ()) - set(parquet.schema_arrow.names))
        if missing:
            raise InputError(f"{file}: column {missing[0]} is missing; build the file again")
        if period is None:
            table = parquet.read(columns=columns)
        else:
            days = [("Date", ">=", period[0]), ("Date", "<=", period[1])]
            table = pq.read_table(file, columns=columns, filters=days)
    return table if columns is None else table.select(columns)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns errors that pyarrow raises in the block, at the footer or at any page, into an InputError about `file`."""
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not a readable parquet file ({reason}); write it again") from error
