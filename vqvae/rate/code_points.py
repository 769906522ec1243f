"""The points of a rate-distortion report that are a version's codes.

They are its own settings, fewer levels, and other worths of a bit.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from vqvae.compress.blocks import BATCH, encode_blocks, learned_search, numbered, training_vectors
from vqvae.compress.code_rows import code_arrays
from vqvae.compress.decode import CodesOfCube, decode_blocks
from vqvae.compress.search import CodeSearch
from vqvae.rate.distortion import Distortion, entropy_bits, packed, unpacked
from vqvae.rate.points import OURS, RatePoint
from warehouse.read.version import Warehouse

__all__ = ["RATE_WEIGHTS", "code_points"]

RATE_WEIGHTS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Values of compress.rate_weight for the curve of the codes."""

Values = NDArray[np.float32]
Held = tuple[Values, NDArray[np.bool_], NDArray[np.int64]]
"""data, valid [n, T, Y, X, F] and origins [n, 3] of held-out blocks."""


def code_points(
    version: CodesOfCube, cube: Warehouse, held: Held, shard_samples: int
) -> tuple[list[RatePoint], Values]:
    """Encode held-out blocks at several rates.

    Parameters
    ----------
    version
        The version of codes, whose own settings come first. The nearest codes
        of each number of levels follow, then all levels at each of RATE_WEIGHTS.
    cube
        Where the prices of codes are learned.
    held
        The blocks.
    shard_samples
        Samples in a stored chunk, which decides how well the codes pack.

    Returns
    -------
    tuple
        The points without their rates, and what the first of them decodes to:
        float32 [n, T, Y, X, F].
    """
    own = version.warehouse.manifest.recipe["settings"]
    # The version's own settings come first: seams are measured on what they decode to.
    choices = [(version.levels, own["rate_weight"], own["paths"])]
    choices += [(levels, 0.0, 1) for levels in range(1, version.levels + 1)]
    choices += [(version.levels, weight, own["paths"]) for weight in RATE_WEIGHTS]
    # Encoded once for all choices; only prices and numbers differ between them.
    vectors = training_vectors(version.codec, cube)

    points: list[RatePoint] = []
    first_guess: Values | None = None
    # A version of the nearest codes at all levels would be measured twice.
    for levels, weight, paths in dict.fromkeys(choices):
        search = learned_search(version.codec, vectors, levels=levels, weight=weight, paths=paths)
        measured, guess = code_point(version, held, search, shard_samples)
        chosen: RatePoint = {
            "codec": OURS,
            "setting": _label(levels, weight, paths),
            "levels": levels,
            "rate_weight": weight,
            "paths": paths,
        }
        points.append({**chosen, **measured})
        first_guess = guess if first_guess is None else first_guess

    assert first_guess is not None
    return points, first_guess


def _label(levels: int, weight: float, paths: int) -> str:
    parts = [f"{levels} levels"]
    if weight:
        parts.append(f"rate weight {weight:g}")
    if paths > 1:
        parts.append(f"{paths} paths")
    return ", ".join(parts)


def code_point(
    version: CodesOfCube, held: Held, search: CodeSearch, size: int
) -> tuple[RatePoint, Values]:
    """Encode held-out blocks with one choice of codes.

    Parameters
    ----------
    version
        The codec and the cube's layout.
    held
        The blocks.
    search
        How codes are chosen, and for how many levels.
    size
        Samples in a stored chunk.

    Returns
    -------
    tuple
        Bytes, errors and seconds (network, search, zstd, and back), and the
        decoded values.
    """
    codec, (data, valid, origins) = version.codec, held
    batches = [slice(start, start + BATCH) for start in range(0, len(data), BATCH)]

    start = time.perf_counter()
    rows = np.concatenate(
        [encode_blocks(codec, data[batch], valid[batch], search) for batch in batches]
    )
    levels, grid = rows.shape[1], rows.shape[2:]
    arrays = code_arrays(len(data), size, levels, grid, codec.codebook_size, valid[0].size)
    specs = {spec.name: spec for spec in arrays}
    values: dict[str, NDArray[np.generic]] = {
        "codes": numbered(rows, search).astype(specs["codes"].dtype),
        "valid": np.packbits(valid.reshape(len(valid), -1), axis=1),
        "origin": origins.astype(np.int32),
    }
    files = {name: packed(values[name], spec) for name, spec in specs.items()}
    encoded = time.perf_counter()

    # Decoded from the files and not from `rows`, so that the point shows what a reader gets.
    order = search.order.numpy()
    numbers = unpacked(files["codes"], specs["codes"], len(data))
    again = np.stack([order[level][numbers[:, level]] for level in range(levels)], axis=1)
    guess = np.concatenate(
        [decode_blocks(codec, again[batch], version.cube.layout.inner) for batch in batches]
    )
    decoded = time.perf_counter()

    errors = Distortion(version.cube.features)
    errors.add(data, guess, valid)
    point: RatePoint = {
        **_code_sizes(rows, files, codec.codebook_size),
        **errors.figures(),
        "encode_seconds": encoded - start,
        "decode_seconds": decoded - encoded,
    }
    return point, guess


def _code_sizes(
    rows: NDArray[np.int64], files: dict[str, list[bytes]], codebook_size: int
) -> RatePoint:
    """Return the bytes of all files, and what ideal and fixed-length codes would need."""
    sizes = {name: sum(map(len, streams)) for name, streams in files.items()}
    ideal = sum(entropy_bits(rows[:, level], codebook_size) for level in range(rows.shape[1])) / 8
    return {
        "all_features": True,
        "bytes": sum(sizes.values()),
        "bytes_by_array": sizes,
        "ideal_codes_bytes": ideal,
        # What codes of equal length would need: the gain of entropy coding shows against it.
        "fixed_codes_bytes": float(rows.size * np.log2(codebook_size) / 8),
    }
