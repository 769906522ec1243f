"""The points of a rate-distortion report that are a version's codes.

Its own, fewer levels, other worths of a bit.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqvae.compress.blocks import BATCH, encode_blocks, learned_search, numbered, training_vectors
from vqvae.compress.encode import code_arrays
from vqvae.compress.reconstruct import CodesOfCube, decode_blocks
from vqvae.compress.search import CodeSearch
from vqvae.rate.measure import Distortion, entropy_bits, packed, unpacked
from vqvae.rate.plot import OURS
from warehouse.read.version import Warehouse

__all__ = ["RATE_WEIGHTS", "code_points"]

RATE_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Of compress.rate_weight, for the curve of the codes."""
Values = NDArray[np.float32]
Held = tuple[Values, NDArray[np.bool_], NDArray[np.int64]]
"""data, valid [n, T, Y, X, F] and origins [n, 3] of held-out blocks."""


def code_points(
    version: CodesOfCube, cube: Warehouse, held: Held, shard_samples: int
) -> tuple[list[dict[str, Any]], Values]:
    """(points, what the first of them decodes to, float32 [n, T, Y, X, F]): the version's own
    settings first, then the nearest codes of each number of levels, then all levels at each of
    RATE_WEIGHTS."""
    own = version.warehouse.manifest.recipe["settings"]
    ways = [(version.levels, own["rate_weight"], own["paths"])]
    ways += [(levels, 0.0, 1) for levels in range(1, version.levels + 1)]
    ways += [(version.levels, weight, own["paths"]) for weight in RATE_WEIGHTS]
    vectors = training_vectors(version.codec, cube)
    points, guess = [], None
    for levels, weight, paths in dict.fromkeys(ways):
        search = learned_search(version.codec, vectors, levels=levels, weight=weight, paths=paths)
        point, values = code_point(version, held, search, shard_samples)
        setting = (
            f"{levels} levels"
            + (f", rate weight {weight:g}" if weight else "")
            + (f", {paths} paths" if paths > 1 else "")
        )
        points.append(
            {
                "codec": OURS,
                "setting": setting,
                "levels": levels,
                "rate_weight": weight,
                "paths": paths,
            }
            | point
        )
        guess = values if guess is None else guess
    assert guess is not None
    return points, guess


def code_point(
    version: CodesOfCube, held: Held, search: CodeSearch, size: int
) -> tuple[dict[str, Any], Values]:
    """Bytes and errors of held-out blocks coded that way, and what they decode to.

    Seconds: network, search, zstd, and back.
    """
    codec, (data, valid, origins) = version.codec, held
    batches = [slice(at, at + BATCH) for at in range(0, len(data), BATCH)]
    start = time.perf_counter()
    rows = np.concatenate(
        [encode_blocks(codec, data[some], valid[some], search) for some in batches]
    )
    levels = rows.shape[1]
    specs = {
        spec.name: spec
        for spec in code_arrays(
            len(data), size, levels, rows.shape[2:], codec.codebook_size, valid[0].size
        )
    }
    bits = np.packbits(valid.reshape(len(valid), -1), axis=1)
    arrays = {
        "codes": numbered(rows, search).astype(specs["codes"].dtype),
        "valid": bits,
        "origin": origins.astype(np.int32),
    }
    files = {name: packed(arrays[name], spec) for name, spec in specs.items()}
    encoded = time.perf_counter()
    order = search.order.numpy()
    numbers = unpacked(files["codes"], specs["codes"], len(data))
    again = np.stack([order[level][numbers[:, level]] for level in range(levels)], axis=1)
    guess = np.concatenate(
        [decode_blocks(codec, again[some], version.cube.layout.inner) for some in batches]
    )
    decoded = time.perf_counter()
    sizes = {name: sum(map(len, some)) for name, some in files.items()}
    ideal = sum(entropy_bits(rows[:, level], codec.codebook_size) for level in range(levels)) / 8
    errors = Distortion(version.cube.features)
    errors.add(data, guess, valid)
    return {
        "all_features": True,
        "bytes": sum(sizes.values()),
        "bytes_by_array": sizes,
        "ideal_codes_bytes": ideal,
        "fixed_codes_bytes": rows.size * np.log2(codec.codebook_size) / 8,
        **errors.figures(),
        "encode_seconds": encoded - start,
        "decode_seconds": decoded - encoded,
    }, guess
