"""Whether an array can be read by our own code, told from its zarr.json.

Our readers decode the codecs that our builder writes and nothing else. A version that another Zarr
implementation rewrote may use others; zarr-python then reads it, more slowly.
"""

from __future__ import annotations

import math
from typing import Any

from warehouse.format.schema import ArraySpec

__all__ = ["foreign"]


def foreign(metadata: dict[str, Any], spec: ArraySpec) -> str | None:
    """Why an array with these zarr.json contents is beyond this module, in half a sentence; None
    when it is of our codecs.

    Raises ValueError or KeyError when the contents are no array's metadata.
    """
    codecs, why = metadata["codecs"], None
    if spec.inner is not None and [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        shard = codecs[0]["configuration"]
        codecs, place = shard["codecs"], shard.get("index_location", "end")
        if [codec["name"] for codec in shard["index_codecs"]] != [
            "bytes",
            "crc32c",
        ] or place != "end":
            why = f"its shard index is of other codecs, at the {place}"
        elif math.prod(shard["chunk_shape"]) != math.prod(spec.inner):
            why = f"its inner chunks are {shard['chunk_shape']}"
    elif spec.inner is not None:
        why = "it is not sharded by sample"
    names = [codec["name"] for codec in codecs]
    grid = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    keys = metadata["chunk_key_encoding"]
    if names != ["bytes", *(["blosc"] if spec.codec.cname else []), "crc32c"]:
        why = f"its codecs are {' | '.join(names)}"
    elif codecs[0].get("configuration", {}).get("endian", "little") != "little":
        why = "its bytes are big-endian"
    # A cube's spec is by sample, its grid by voxel: the seal of each file is left to tell.
    elif why is None and len(grid) == len(spec.chunk) and grid != spec.chunk:
        why = f"its stored chunks are {grid}"
    elif keys["name"] != "default" or keys.get("configuration", {}).get("separator", "/") != "/":
        why = "its files have other names"
    return why
