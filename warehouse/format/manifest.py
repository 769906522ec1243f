"""The manifest, the version's name and the tables beside the store: what makes a version checkable.

Chain of trust: the folder's name is the recipe's hash; the manifest holds its own digest and the
tables' sha256; files.parquet holds every data file's size, sha256 and seal. Nothing in them differs
from run to run, and no path in them is absolute.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from warehouse.errors import CorruptError, NotAWarehouseError
from warehouse.format import durable
from warehouse.format.location import Location, Remote
from warehouse.format.schema import FORMAT_VERSION, Codec

__all__ = [
    "CURRENT",
    "FILES",
    "MANIFEST",
    "REJECTED",
    "SAMPLES",
    "STORE",
    "TRACE",
    "ArrayInfo",
    "Manifest",
    "SplitInfo",
    "canonical",
    "code_version",
    "open_table",
    "read_manifest",
    "read_table",
    "sha256_file",
    "toolchain",
    "version_name",
    "write_manifest",
    "write_table",
]

CURRENT, MANIFEST, FILES, SAMPLES = "CURRENT", "manifest.json", "files.parquet", "samples.parquet"
REJECTED, TRACE, STORE = "rejected.jsonl", "trace.jsonl", "warehouse.zarr"
VERSION_NAME = re.compile(r"v[0-9a-f]{12}")
MAX_MANIFEST_BYTES = 64 << 20
_REMEDY = "a published version never changes; build it again with --build.if_exists clear"


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """A split in the manifest.

    Attributes
    ----------
    samples
        Samples of the split.
    shard_samples
        Samples that a stored chunk has room for.
    chunks
        Stored chunks that hold samples of the split.
    """

    samples: int
    shard_samples: int
    chunks: int


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array in the manifest; it is the same in every split.

    Attributes
    ----------
    row
        Shape of one sample.
    dims
        Names of the dimensions, `sample` first.
    sharded
        Whether a stored chunk is a shard with inner chunks of its own.
    attrs
        Attributes of the Zarr array.
    """

    dtype: str
    row: tuple[int, ...]
    dims: tuple[str, ...]
    sharded: bool
    codec: Codec
    attrs: dict[str, Any] = field(default_factory=dict)


class Manifest(BaseModel):
    """manifest.json. `digest`: sha256 of the decoded content, the same for every codec and stored
    chunk. `cube`: warehouse/layouts/cube/geometry.py."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    version: str
    key: str
    recipe: dict[str, Any]
    thresholds: dict[str, Any]
    toolchain: dict[str, str]
    digest: str
    found: int
    kept: int
    rejected: int
    class_names: list[str]
    splits: dict[str, SplitInfo]
    arrays: dict[str, ArrayInfo]
    summary: dict[str, Any]
    warnings: list[str]
    tables: dict[str, str]
    cube: dict[str, Any] | None = None


def canonical(data: Any) -> bytes:
    """JSON with sorted keys and no spare blanks: what is hashed."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def version_name(recipe: dict[str, Any]) -> tuple[str, str]:
    """(version, key): `v` + the first 12 hex digits of the recipe's sha256, and all 64."""
    key = hashlib.sha256(canonical(recipe)).hexdigest()
    return f"v{key[:12]}", key


def code_version() -> str:
    """CODE_VERSION from the environment, else the installed package's version."""
    if os.environ.get("CODE_VERSION"):
        return os.environ["CODE_VERSION"]
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tensor-warehouse")
    except PackageNotFoundError:
        return "0"


def toolchain() -> dict[str, str]:
    """Versions of what decides the encoded bytes."""
    from importlib.metadata import version

    return {name: version(name) for name in ("numcodecs", "numpy", "pyarrow", "zarr")} | {
        "format": str(FORMAT_VERSION)
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    data = manifest.model_dump(mode="json")
    data["manifest_sha256"] = hashlib.sha256(canonical(data)).hexdigest()
    durable.write_bytes(
        folder / MANIFEST, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode()
    )


def read_manifest(folder: Location) -> Manifest:
    """The checked manifest of a version folder. Raises NotAWarehouseError or CorruptError."""
    path = folder / MANIFEST
    try:
        if isinstance(path, Remote):
            raw = path.read_bytes(MAX_MANIFEST_BYTES)
        else:
            if path.is_symlink() or not path.is_file():
                raise FileNotFoundError
            if path.stat().st_size > MAX_MANIFEST_BYTES:
                raise CorruptError(
                    "the manifest is too large",
                    where=path,
                    expected=f"at most {MAX_MANIFEST_BYTES} bytes",
                )
            raw = path.read_bytes()
    except OSError:
        raise NotAWarehouseError(
            "no manifest here",
            where=path,
            remedy="build it with python -m scripts.build_zarr --build.if_exists clear",
        ) from None
    try:
        data = json.loads(raw)
        found = data.pop("manifest_sha256")
        expected = hashlib.sha256(canonical(data)).hexdigest()
        if found != expected:
            raise CorruptError(
                "the manifest was changed after publishing",
                where=path,
                expected=expected[:12],
                found=str(found)[:12],
                remedy=_REMEDY,
            )
        manifest = Manifest(**data)
    except (
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        ValidationError,
    ) as error:
        raise CorruptError(
            "the manifest does not parse", where=path, found=f"{error}"[:160], remedy=_REMEDY
        ) from None
    if manifest.format_version != FORMAT_VERSION:
        raise CorruptError(
            "the version has another format",
            where=path,
            expected=FORMAT_VERSION,
            found=manifest.format_version,
            remedy="build it again with this release",
        )
    name, key = version_name(manifest.recipe)
    if VERSION_NAME.fullmatch(folder.name) and folder.name != name:
        raise CorruptError(
            "a version folder holds another version",
            where=folder,
            expected=folder.name,
            found=name,
            remedy=_REMEDY,
        )
    if (name, key) != (manifest.version, manifest.key):
        raise CorruptError(
            "the recipe does not give the version's name",
            where=path,
            expected=name,
            found=manifest.version,
            remedy=_REMEDY,
        )
    return manifest


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_table(path: Path, columns: Mapping[str, Any], schema: pa.Schema) -> str:
    """Write a Parquet table durably; its sha256.

    The same columns give the same bytes with one pyarrow release.
    """
    table = pa.table(dict(columns), schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", row_group_size=1 << 16, write_page_checksum=True
    )
    data = sink.getvalue().to_pybytes()
    durable.write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def read_table(
    folder: Location, manifest: Manifest, name: str, columns: list[str] | None = None
) -> pa.Table:
    """A table of a version, its sha256 checked against the manifest.

    Raises CorruptError naming the file.
    """
    with open_table(folder, manifest, name) as table:
        return table.read(columns)


@contextmanager
def open_table(folder: Location, manifest: Manifest, name: str) -> Iterator[pq.ParquetFile]:
    """The same without reading it: a local table's row groups are read as they are asked for.

    `array` comes dictionary-encoded.
    """
    path = folder / name
    with ExitStack() as stack:
        try:
            file: Any = (
                stack.enter_context(open(path, "rb"))
                if isinstance(path, Path)
                else io.BytesIO(path.read_bytes())
            )
            found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CorruptError(
                "a table is missing", where=path, found=error.strerror, remedy=_REMEDY
            ) from None
        if found != manifest.tables.get(name):
            raise CorruptError(
                "a table was changed after publishing",
                where=path,
                expected=f"sha256 {manifest.tables.get(name, 'none')[:12]}",
                remedy=_REMEDY,
            )
        file.seek(0)
        yield stack.enter_context(
            pq.ParquetFile(file, read_dictionary=["array"] if name == FILES else None)
        )


def safe_relative(name: str, where: Location) -> PurePosixPath:
    """A path of a table as one below its folder.

    Raises CorruptError for absolute paths, `..`, NUL and over-long names.
    """
    path = PurePosixPath(name)
    if (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or "\0" in name
        or "\\" in name
        or len(name) > 1024
    ):
        raise CorruptError(
            "a path in a table leads out of the version",
            where=where,
            found=f"{name[:80]!r}",
            remedy=_REMEDY,
        )
    return path


FILES_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("array", pa.string()),
        ("chunk", pa.int64()),
        ("seal", pa.uint32()),
    ]
)
"""path.

Below the version folder. array ("train/image"), chunk and seal are null for zarr.json files.
"""
