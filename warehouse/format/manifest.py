"""The manifest and the name of a version: what makes it possible to check the version.

Chain of trust: the name of the folder is the hash of the recipe; the manifest holds its own digest
and the sha256 of the tables; files.parquet holds the size, sha256 and seal of every data file.
Nothing in the manifest differs from run to run, and no path in it is absolute. What was given up
for that: the manifest does not record when, where or by whom a version was built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    "REMEDY",
    "SAMPLES",
    "STORE",
    "TRACE",
    "ArrayInfo",
    "Manifest",
    "SplitInfo",
    "canonical",
    "code_version",
    "read_manifest",
    "sha256_file",
    "toolchain",
    "version_name",
    "write_manifest",
]

CURRENT, MANIFEST, FILES, SAMPLES = "CURRENT", "manifest.json", "files.parquet", "samples.parquet"
REJECTED, TRACE, STORE = "rejected.jsonl", "trace.jsonl", "warehouse.zarr"
VERSION_NAME = re.compile(r"v[0-9a-f]{12}")
MAX_MANIFEST_BYTES = 64 << 20
REMEDY = "a published version never changes; build it again with --build.if_exists clear"


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
    """The contents of manifest.json, without its own digest.

    Attributes
    ----------
    version, key
        Name of the version, and all 64 digits of the hash that the name is cut from.
    recipe
        What the name is a hash of: settings and sources that decide the content.
    digest
        sha256 of the decoded content, the same for every codec and every size of stored chunks.
    found, kept, rejected
        Sources that were found, that were baked, and that were refused.
    tables
        sha256 of each Parquet table, by file name.
    cube
        What `CubeGeometry.to_json` gives; None for versions of other kinds.
    """

    # A key that we do not know was written by a later release, which may mean something by it.
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
    """Return JSON with sorted keys and no spare blanks: the bytes that are hashed."""
    # NaN is no JSON, and other parsers would refuse what Python writes for it.
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def version_name(recipe: dict[str, Any]) -> tuple[str, str]:
    """Return (version, key) of a recipe.

    The version is `v` and the first 12 hex digits of the recipe's sha256; the key is all 64.
    """
    key = hashlib.sha256(canonical(recipe)).hexdigest()
    # 48 bits: a million versions in one warehouse would collide with a probability of 0.2%.
    return f"v{key[:12]}", key


def code_version() -> str:
    """Return CODE_VERSION from the environment, or else the version of the installed package."""
    if os.environ.get("CODE_VERSION"):
        return os.environ["CODE_VERSION"]

    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tensor-warehouse")
    except PackageNotFoundError:
        return "0"


def toolchain() -> dict[str, str]:
    """Return the versions of the libraries that decide the encoded bytes, and of the format."""
    from importlib.metadata import version

    return {name: version(name) for name in ("numcodecs", "numpy", "pyarrow", "zarr")} | {
        "format": str(FORMAT_VERSION)
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json durably, with its own digest in `manifest_sha256`."""
    data = manifest.model_dump(mode="json")
    data["manifest_sha256"] = hashlib.sha256(canonical(data)).hexdigest()
    durable.write_bytes(
        folder / MANIFEST, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False).encode()
    )


def read_manifest(folder: Location) -> Manifest:
    """Return the checked manifest of a version folder.

    Raises
    ------
    NotAWarehouseError
        There is no manifest, or it cannot be opened.
    CorruptError
        The manifest is too large, does not parse, does not match its own digest, or belongs to
        another format or another version.
    """
    path = folder / MANIFEST
    raw = _read_limited(path)
    manifest = _parse(raw, path)

    if manifest.format_version != FORMAT_VERSION:
        raise CorruptError(
            "the version has another format",
            where=path,
            expected=FORMAT_VERSION,
            found=manifest.format_version,
            remedy="build it again with this release",
        )
    _check_name(manifest, folder)

    return manifest


def _read_limited(path: Location) -> bytes:
    """The bytes of a manifest. Raises NotAWarehouseError, or CorruptError where it is too large."""
    try:
        if isinstance(path, Remote):
            return path.read_bytes(MAX_MANIFEST_BYTES)
        # A link could lead out of the root.
        if path.is_symlink() or not path.is_file():
            raise FileNotFoundError
        # Before reading: the file may be anything, and it is held in memory as a whole.
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CorruptError(
                "the manifest is too large",
                where=path,
                expected=f"at most {MAX_MANIFEST_BYTES} bytes",
            )
        return path.read_bytes()
    except OSError:
        raise NotAWarehouseError(
            "no manifest here",
            where=path,
            remedy="build it with python -m scripts.build_zarr --build.if_exists clear",
        ) from None


def _parse(raw: bytes, path: Location) -> Manifest:
    """A manifest from its file's bytes, its own digest compared. Raises CorruptError."""
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
                remedy=REMEDY,
            )
        return Manifest(**data)
    # Any bytes may stand in the file: JSON that is no object, that lacks the digest, or that is
    # nested deeper than the parser goes is damage like any other, not a bug.
    except (
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        ValidationError,
    ) as error:
        raise CorruptError(
            "the manifest does not parse", where=path, found=f"{error}"[:160], remedy=REMEDY
        ) from None


def _check_name(manifest: Manifest, folder: Location) -> None:
    """Compare a version's name with its folder's and with its recipe. Raises CorruptError."""
    name, key = version_name(manifest.recipe)

    # A version that was copied to a folder of any other name still opens; only a folder whose name
    # looks like that of a version has to be that version's.
    if VERSION_NAME.fullmatch(folder.name) and folder.name != name:
        raise CorruptError(
            "a version folder holds another version",
            where=folder,
            expected=folder.name,
            found=name,
            remedy=REMEDY,
        )
    if (name, key) != (manifest.version, manifest.key):
        raise CorruptError(
            "the recipe does not give the version's name",
            where=folder / MANIFEST,
            expected=name,
            found=manifest.version,
            remedy=REMEDY,
        )


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file, which is read in parts."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
