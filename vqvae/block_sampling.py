"""Which blocks of a cube are trained on, in which order, and which part of each.

A sample is one inner chunk, or a window inside it that is cut after decoding, so each inner chunk
is still decoded once an epoch. Samples with less than `min_valid_share` valid voxels are left out
by a sampler over the rest: sample numbers stay as they are in the store, and the rule is part of
the sampler's state and of the checkpoint's settings.

Reading a source such as NAIP separately, beside the cube, is not offered: its grid is not the
cube's, so every step would warp and check it again, and neither digests nor splits would cover it.
Declare it as a feature of the cube instead (`raster.features`), with `static: true` where it has no
time, and build again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.augment import uniform
from utils.loader import ChunkLoader
from utils.log import get_log
from utils.samplers import BatchSampler, ChunkBatchSampler, RandomBatchSampler
from warehouse.errors import ConfigError, TrainingError
from warehouse.layouts.cube_geometry import Feature

__all__ = ["cube_features", "cut", "drawn_blocks", "held_out_split", "make_sampler", "sample_depth"]

log = get_log(__name__)
TURN, MIRROR, WINDOW_T, WINDOW_Y, WINDOW_X, HAS_DEPTH, DEPTH = range(32, 39)
START_BLOCKS = 128
Triple = tuple[int, int, int]
Sampling = Literal["chunk", "random"]


def cube_features(split: Any) -> tuple[Feature, ...]:
    """The features of a cube's split.

    Raises TrainingError when the warehouse is one of pictures.
    """
    if "data" not in split.arrays:
        raise TrainingError(
            "this warehouse holds pictures, no cube",
            where=split.warehouse.folder,
            remedy="build one with --build.format raster, or train with python -m scripts.train_detector",
        )
    return tuple(split.features)


def held_out_split(warehouse: Any) -> Any:
    """`val`, else `test`, else `train`, whichever has blocks first."""
    splits = {name: warehouse.split(name) for name in warehouse.splits}
    name = next((name for name in ("val", "test") if name in splits and len(splits[name])), "train")
    if name != "val":
        log.warning("the warehouse has no val blocks: scoring on %s", name)
    return splits[name]


def make_sampler(
    split: Any,
    batch_size: int,
    min_valid_share: float,
    *,
    sampling: Sampling = "chunk",
    **options: Any,
) -> BatchSampler:
    """A sampler over the samples with at least that share of valid voxels; options as of the
    samplers in utils.samplers.

    Raises TrainingError when no sample is left.
    """
    keep = np.asarray(split.valid_share) >= min_valid_share
    if not keep.any():
        best = float(np.max(split.valid_share, initial=0.0))
        raise TrainingError(
            "no block has enough valid voxels",
            where=repr(split),
            expected=f"a share of at least {min_valid_share:g}",
            found=f"{best:g} at most",
            remedy="lower --vqvae.min_valid_share",
        )
    if not keep.all():
        log.info(
            "%s: %d of %d blocks have under %g valid voxels and are left out",
            split.name,
            int((~keep).sum()),
            len(keep),
            min_valid_share,
        )
    if sampling == "random":
        options = {
            key: value
            for key, value in options.items()
            if key not in {"interleave", "chunks_per_batch"}
        }
        return KeptRandomSampler(split.chunk_sizes, batch_size, keep=keep, **options)
    return KeptChunkSampler(split.chunk_sizes, batch_size, keep=keep, **options)


def drawn_blocks(
    split: Any, min_valid_share: float, count: int = START_BLOCKS
) -> dict[str, Tensor]:
    """One batch of up to `count` of these samples, drawn from all over the split.

    The same for every rank and seed.
    """
    with ChunkLoader(
        split,
        sampler=make_sampler(split, count, min_valid_share, sampling="random"),
        engine="inline",
    ) as loader:
        return {key: value.clone() for key, value in next(iter(loader)).items()}


class _Kept(BatchSampler):
    """Samples where keep [n] is true, in the order the plain sampler gives chunks of only those.

    Their numbers stay the store's.
    """

    plain: type[BatchSampler]

    def __init__(
        self,
        chunk_sizes: Sequence[int],
        batch_size: int,
        *,
        keep: NDArray[np.bool_],
        **options: Any,
    ) -> None:
        with warnings.catch_warnings():
            # The sampler below warns of what is really left in the chunks.
            warnings.simplefilter("ignore")
            super().__init__(chunk_sizes, batch_size, **options)
        if len(keep) != self.sizes.sum():
            raise ConfigError(
                "one share a sample is needed", expected=int(self.sizes.sum()), found=len(keep)
            )
        self.kept = np.flatnonzero(keep)
        starts = np.cumsum(self.sizes) - self.sizes
        counts = np.add.reduceat(keep.astype(np.int64), starts)
        self.below = self.plain(counts[counts > 0].tolist(), batch_size, **options)

    def _make_order(self, epoch: int) -> Any:
        self.below.set_epoch(epoch)
        return _Renumbered(self.below.order, self.kept)

    def options(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.sizes.tobytes() + self.kept.tobytes()).hexdigest()[:16]
        return super().options() | {"samples": len(self.kept), "chunks": digest}


class _Renumbered:
    def __init__(self, order: Any, kept: NDArray[np.int64]) -> None:
        self.order, self.kept, self.total = order, kept, order.total

    def batch(self, number: int) -> NDArray[np.int64]:
        return self.kept[self.order.batch(number)]


class KeptChunkSampler(_Kept, ChunkBatchSampler):
    plain = ChunkBatchSampler


class KeptRandomSampler(_Kept, RandomBatchSampler):
    plain = RandomBatchSampler


def cut(
    batch: dict[str, Tensor],
    window: Triple | None,
    *,
    seed: int = 0,
    epoch: int | None = None,
    flips: bool = False,
) -> tuple[Tensor, Tensor]:
    """A batch's data float32 [B, t, y, x, F] and valid bool, cut to `window` (None: whole).

    In training (epoch given) each sample's window lies where (seed, epoch, index) says, and is
    turned by quarters and mirrored when `flips` and its sides are equal; in evaluation it is the
    middle one, as it is.
    """
    data, valid = batch["data"], batch["valid"]
    size = tuple(data.shape[1:4])
    wanted = window or size
    room = [whole - part for whole, part in zip(size, wanted, strict=True)]
    index = batch["index"].cpu().numpy()

    def draw(purpose: int, count: int) -> NDArray[np.int64]:
        if epoch is None:
            return np.full(len(index), count // 2)
        return (uniform(seed, epoch, index, purpose) * count).astype(np.int64)

    if any(room):
        corners = np.stack(
            [
                draw(purpose, free + 1)
                for purpose, free in zip((WINDOW_T, WINDOW_Y, WINDOW_X), room, strict=True)
            ],
            axis=1,
        )
        places = [
            tuple(slice(at, at + part) for at, part in zip(corner, wanted, strict=True))
            for corner in corners.tolist()
        ]
        data, valid = (
            torch.stack([sample[place] for sample, place in zip(array, places, strict=True)])
            for array in (data, valid)
        )
    if not flips or epoch is None or wanted[1] != wanted[2]:
        return data, valid
    turns, mirrored = draw(TURN, 4).tolist(), draw(MIRROR, 2).tolist()

    def moved(array: Tensor) -> Tensor:
        turned = (sample.rot90(turn, (1, 2)) for sample, turn in zip(array, turns, strict=True))
        return torch.stack(
            [
                sample.flip(2) if mirror else sample
                for sample, mirror in zip(turned, mirrored, strict=True)
            ]
        )

    return moved(data), moved(valid)


def sample_depth(
    index: Tensor, levels: int, share: float, *, seed: int, epoch: int
) -> Tensor | None:
    """How many residual levels each sample is decoded from, int64 [B] in 1..levels: all, but for
    `share` of them an even draw.

    So one model decodes from any number of its levels. None: all of them for every sample.
    """
    if levels == 1 or share == 0:
        return None
    numbers = index.cpu().numpy()
    drawn = 1 + (uniform(seed, epoch, numbers, DEPTH) * levels).astype(np.int64)
    depth = np.where(uniform(seed, epoch, numbers, HAS_DEPTH) < share, drawn, levels)
    return torch.from_numpy(depth).to(index.device)
