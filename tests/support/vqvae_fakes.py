"""Features of a small cube, the shape of a small model, and blocks to train it with."""

from __future__ import annotations

import numpy as np
import torch

from vqvae.network.model import Shape
from warehouse.layouts.features import Feature

RED = Feature("red", "continuous", mean=90.0, std=30.0, minimum=0.0, maximum=255.0)
NDVI = Feature("ndvi", "continuous", mean=0.2, std=0.3, minimum=-1.0, maximum=1.0)
UNITS = [size * float(np.sqrt(((30 / 240) ** 2 + (0.3 / 2) ** 2) / 2)) for size in (240, 2)]
COVER = Feature("cover", "canopy", mean=16.0, std=20.0, minimum=0.0, maximum=100.0)
CLASSES = Feature("class", "categorical", codes=(7, -1, 40), class_counts=(10, 80, 10))
FEATURES = (RED, CLASSES, NDVI, COVER)
SHAPE = Shape(
    (5, 8, 8),
    stride=(5, 4, 4),
    patch=(5, 4, 4),
    width=16,
    depth=1,
    codebook_size=16,
    code_dim=6,
    levels=2,
)


def blocks(
    count: int = 6, seed: int = 0, size: tuple[int, int, int] = (5, 8, 8)
) -> dict[str, torch.Tensor]:
    """Smooth fields with a few holes; one feature's holes are not another's."""
    generator = np.random.default_rng(seed)
    t, y, x = np.meshgrid(*(np.linspace(0, 1, part) for part in size), indexing="ij")
    a, b, c = generator.normal(size=(3, count, 1, 1, 1))
    field = np.tanh(a * y + b * x + 0.5 * c * t + 0.3 * np.sin(9 * x * a))
    data = np.stack(
        [
            90 + 30 * field,
            np.where(field > 0.2, 40, np.where(field > -0.3, 7, -1)),
            0.2 + 0.3 * field,
            np.clip(60 * field, 0, None),
        ],
        axis=-1,
    ).astype(np.float32)
    valid = generator.random(data.shape) > 0.05
    return {
        "data": torch.from_numpy(np.where(valid, data, np.nan)).float(),
        "valid": torch.from_numpy(valid),
        "index": torch.arange(count),
    }
