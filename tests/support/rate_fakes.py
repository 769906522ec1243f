"""Blocks of a synthetic landscape, as the codecs of the rate report get them."""

from __future__ import annotations

import numpy as np

from vqvae.rate.mosaic import Mosaic


def landscape(seed: int = 0, blocks: int = 8) -> np.ndarray:
    """float32 [blocks, 5, 32, 32, 3].

    Waves that three features and five dates share, and a little noise.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32] / 32
    field = np.sin(6 * y[None, None] + rng.uniform(0, 6, (blocks, 5, 1, 1))) * np.cos(5 * x) / 4
    values = np.stack([field, 0.8 * field, -0.5 * field], axis=-1).astype(np.float32)
    return values + rng.normal(0, 0.01, values.shape).astype(np.float32)


def row_of_blocks(count: int) -> Mosaic:
    return Mosaic(
        np.stack([np.zeros(count, int), np.zeros(count, int), np.arange(count) * 32], axis=1),
        (5, 32, 32),
        (5, 32, 32 * count),
    )
