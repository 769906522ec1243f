"""Items that follow from their number, a dataset that counts what it computes, and what makes two
items the same.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch


def same(one, two):
    """Equal in type, order, dtype, shape and bits."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == two.dtype
            and one.shape == two.shape
            and one.contiguous().numpy(force=True).tobytes() == two.numpy().tobytes()
        )
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    return one == two or (isinstance(one, float) and math.isnan(one) and math.isnan(two))


def polygons(index):
    """A ragged text-detection item that follows from its number."""
    rng = np.random.default_rng(index)
    return {
        "image": torch.from_numpy(rng.random((3, 16, 16), dtype=np.float32)),
        "polygons": [rng.random((int(corners), 2)) for corners in rng.integers(3, 9, index % 4)],
        "ignore": [bool(flag) for flag in rng.integers(0, 2, index % 4)],
        "text": [f"word {index}"] * (index % 3),
        "shape": (16, 16),
        "scale": 0.1 * index,
    }


class Polygons:
    """calls: a file that grows by a byte for each computation, in any process."""

    def __init__(self, count, calls=None, cost=0.0):
        self.count, self.calls, self.cost = count, calls, cost

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if self.calls is not None:
            with open(self.calls, "ab", buffering=0) as file:
                file.write(b".")
        if self.cost:
            field = np.random.default_rng(index).random((3, 96, 96))
            end = time.perf_counter() + self.cost
            while time.perf_counter() < end:
                field = np.abs(np.fft.ifft2(np.fft.fft2(field)))
        return polygons(index)


class RandomCrop:
    def __call__(self, item):
        return item
