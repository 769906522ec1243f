"""Whether our own code can read an array, judged by its zarr.json.

Our readers decode the codecs that our builder writes and no others. A version that another
implementation of Zarr rewrote may use other codecs; zarr-python then reads it, at 0.5 to 1 ms an
inner chunk. Given up: reading such a version as fast as our own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from warehouse.format.schema import ArraySpec

__all__ = ["foreign"]


def foreign(metadata: Mapping[str, Any], spec: ArraySpec) -> str | None:
    """Return why our own code cannot read an array, in half a sentence, or None if it can.

    Parameters
    ----------
    metadata
        Contents of the array's zarr.json.
    spec
        The array as the manifest has it.

    Raises
    ------
    ValueError, KeyError
        The contents are not those of an array.
    """
    codecs, sharding = metadata["codecs"], None
    if spec.inner is not None:
        if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
            shard = codecs[0]["configuration"]
            sharding = _foreign_shard(shard, spec.inner)
            codecs = shard["codecs"]
        else:
            sharding = "it is not sharded by sample"

    # All are looked up before any is told, so that contents of no array are an error in any case.
    grid = _foreign_grid(metadata["chunk_grid"], spec)
    keys = _foreign_keys(metadata["chunk_key_encoding"])

    return _foreign_codecs(codecs, spec) or sharding or grid or keys


def _foreign_shard(shard: Mapping[str, Any], inner: Sequence[int]) -> str | None:
    index_codecs = [codec["name"] for codec in shard["index_codecs"]]
    location = shard.get("index_location", "end")
    if index_codecs != ["bytes", "crc32c"] or location != "end":
        return f"its shard index is of other codecs, at the {location}"
    # By size and not by shape: the spec of a cube is by sample, its inner chunks are by voxel.
    if math.prod(shard["chunk_shape"]) != math.prod(inner):
        return f"its inner chunks are {shard['chunk_shape']}"
    return None


def _foreign_codecs(codecs: Sequence[Mapping[str, Any]], spec: ArraySpec) -> str | None:
    names = [codec["name"] for codec in codecs]
    if names != ["bytes", *(["blosc"] if spec.codec.cname else []), "crc32c"]:
        return f"its codecs are {' | '.join(names)}"
    # Arrays of 1-byte items have no endianness.
    if codecs[0].get("configuration", {}).get("endian", "little") != "little":
        return "its bytes are big-endian"
    return None


def _foreign_grid(chunk_grid: Mapping[str, Any], spec: ArraySpec) -> str | None:
    grid = tuple(chunk_grid["configuration"]["chunk_shape"])
    # The spec of a cube is by sample, its grid by voxel: there, the seal of each file tells.
    if len(grid) == len(spec.chunk) and grid != spec.chunk:
        return f"its stored chunks are {grid}"
    return None


def _foreign_keys(encoding: Mapping[str, Any]) -> str | None:
    separator = encoding.get("configuration", {}).get("separator", "/")
    if encoding["name"] != "default" or separator != "/":
        return "its files have other names"
    return None
