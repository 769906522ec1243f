"""python -m examples.cached_tensors artifacts/tensor_warehouse artifacts/cache

Compute an expensive, deterministic transform once for each sample and keep the result.
The file in the second folder is also used by the next run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from utils.caching.cached_loader import CachedLoader
from utils.caching.tensor_cache import CachedDataset, CacheKey, fingerprint
from warehouse import Warehouse


@dataclass(frozen=True)
class Spectrum:
    """The logarithm of an image's spectrum, float32 [C, H, W // 2 + 1]."""

    # `fingerprint` covers the fields: items kept with another floor are never used for this one.
    floor: float = 1e-3

    def __call__(self, image: Tensor) -> Tensor:
        return torch.fft.rfft2(image.float() / 255).abs().clamp_min(self.floor).log()


class Spectra:
    """A map-style dataset, as PyTorch's DataLoader takes it."""

    def __init__(self, path: str, split: str, transform: Spectrum) -> None:
        self.image = Warehouse.open(path).split(split).array("image")
        self.transform = transform

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"spectrum": self.transform(torch.from_numpy(self.image[index]))}


def main(path: str = "artifacts/tensor_warehouse", folder: str = "artifacts/cache") -> None:
    transform = Spectrum()
    dataset = Spectra(path, "val", transform)
    # The version is part of the key, so a rebuilt warehouse gets a cache of its own.
    key = CacheKey(Warehouse.open(path).version, "val", fingerprint(transform))
    cached = CachedDataset(dataset, transform=transform, key=key, folder=Path(folder))
    # With `num_workers`, processes compute the items that are not kept yet.
    loader = CachedLoader(cached, batch_size=4)
    for epoch in range(2):
        mean = torch.cat([batch["spectrum"] for batch in loader]).mean()
        print(f"epoch {epoch}: mean {mean:.4f}, {cached.cache.stats}")


if __name__ == "__main__":
    main(*sys.argv[1:])
