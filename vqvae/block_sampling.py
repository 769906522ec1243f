"""Which blocks of a cube are trained on, in which order, and which part of each.

A sample is one inner chunk, or a window inside it that is cut after decoding, so that each inner
chunk is still decoded once an epoch. Samples with less than `min_valid_share` valid voxels are left
out by a sampler over the rest: sample numbers stay as they are in the store, and the rule is part
of the sampler's state and of the checkpoint's settings.

Reading a source such as NAIP separately, beside the cube, is not supported: its grid is not the
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

from utils.augment import turn_and_mirror, uniform
from utils.loader import ChunkLoader
from utils.loading.orders import Order
from utils.log import get_log
from utils.samplers import BatchSampler, ChunkBatchSampler, RandomBatchSampler
from warehouse.errors import ConfigError, TrainingError
from warehouse.layouts.features import Feature
from warehouse.read.version import Split

__all__ = ["cube_features", "cut", "drawn_blocks", "make_sampler", "sample_depth"]

log = get_log(__name__)
# Purposes of random numbers. They begin at 32 to stay clear of those of utils.augment: with the
# same number, a turn would always come with the same flip.
TURN, MIRROR, WINDOW_T, WINDOW_Y, WINDOW_X, HAS_DEPTH, DEPTH = range(32, 39)
START_BLOCKS = 128
Triple = tuple[int, int, int]
Sampling = Literal["chunk", "random"]


def cube_features(split: Split) -> tuple[Feature, ...]:
    """Return the features of a cube's split.

    Raises
    ------
    TrainingError
        The version is not a cube.
    """
    if "data" not in split.arrays:
        raise TrainingError(
            "this version is not a cube",
            where=split.warehouse.folder,
            found=f"the arrays {', '.join(split.arrays)}",
            remedy="build a cube with --build.format raster; images with boxes are for"
            " python -m scripts.train_detector",
        )
    return tuple(split.features)


def make_sampler(
    split: Split,
    batch_size: int,
    min_valid_share: float,
    *,
    sampling: Sampling = "chunk",
    **options: Any,
) -> BatchSampler:
    """Make a sampler over the samples with enough valid voxels.

    Parameters
    ----------
    split
        Of a cube.
    batch_size
        Samples a batch.
    min_valid_share
        The least share of valid voxels, in 0..1.
    sampling
        "chunk" keeps a batch within a stored chunk, "random" reads every chunk
        for every batch.
    options
        As of the samplers in utils.samplers.

    Raises
    ------
    TrainingError
        No sample is left.
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
        # A random order has no chunks to take turns.
        for name in ("interleave", "chunks_per_batch"):
            options.pop(name, None)
        return KeptRandomSampler(split.chunk_sizes, batch_size, keep=keep, **options)
    return KeptChunkSampler(split.chunk_sizes, batch_size, keep=keep, **options)


def drawn_blocks(
    split: Split, min_valid_share: float, count: int = START_BLOCKS
) -> dict[str, Tensor]:
    """Read one batch of up to `count` of these samples, drawn from all over the split.

    It is the same for every rank and seed, so that all ranks start from the same
    weights.
    """
    sampler = make_sampler(split, count, min_valid_share, sampling="random")
    with ChunkLoader(split, sampler=sampler, engine="inline") as loader:
        # Copied, since the loader reuses its buffers.
        return {key: value.clone() for key, value in next(iter(loader)).items()}


class _Kept(BatchSampler):
    """Samples where `keep` is True, in the order that the plain sampler gives chunks of only those.

    Their numbers stay those of the store.
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
        # The order is made over the kept samples alone and renumbered: leaving samples out of a
        # full order would give batches of unequal size.
        self.kept = np.flatnonzero(keep)
        starts = np.cumsum(self.sizes) - self.sizes
        counts = np.add.reduceat(keep.astype(np.int64), starts)
        # A chunk that nothing is left of must not take a turn.
        self.below = self.plain(counts[counts > 0].tolist(), batch_size, **options)

    # Any: an `Order`, but the samplers that this is mixed into promise their own kinds of one.
    def _make_order(self, epoch: int) -> Any:
        self.below.set_epoch(epoch)
        return _Renumbered(self.below.order, self.kept)

    def options(self) -> dict[str, Any]:
        # In the sampler's state, so that a run is not resumed in an order of other samples.
        digest = hashlib.sha256(self.sizes.tobytes() + self.kept.tobytes()).hexdigest()[:16]
        return super().options() | {"samples": len(self.kept), "chunks": digest}


class _Renumbered:
    def __init__(self, order: Order, kept: NDArray[np.int64]) -> None:
        self.order, self.kept, self.total = order, kept, order.total

    def batch(self, number: int) -> NDArray[np.int64]:
        chosen: NDArray[np.int64] = self.kept[self.order.batch(number)]
        return chosen


class KeptChunkSampler(_Kept, ChunkBatchSampler):
    """The kept samples, a batch within a stored chunk."""

    plain = ChunkBatchSampler


class KeptRandomSampler(_Kept, RandomBatchSampler):
    """The kept samples in a random order of the whole split."""

    plain = RandomBatchSampler


def cut(
    batch: dict[str, Tensor],
    window: Triple | None,
    *,
    seed: int = 0,
    epoch: int | None = None,
    flips: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cut a batch to windows, and flip it.

    In training each sample's window lies where (seed, epoch, index) says, and is
    turned by quarters and mirrored if its sides are equal. In evaluation it is the
    middle one, as it is.

    Parameters
    ----------
    batch
        `data`, `valid` and `index` of a loader.
    window
        (time, y, x) in voxels; None for whole blocks.
    seed
        Of all random choices.
    epoch
        Of the training; None for evaluation.
    flips
        Whether to turn and mirror.

    Returns
    -------
    tuple of Tensor
        data float32 and valid bool [B, t, y, x, F].
    """
    data, valid = batch["data"], batch["valid"]
    size = tuple(data.shape[1:4])
    wanted = window or size
    room = [total - part for total, part in zip(size, wanted, strict=True)]
    index = batch["index"].cpu().numpy()

    def draw(purpose: int, count: int) -> NDArray[np.int64]:
        if epoch is None:
            # The middle, so that every evaluation scores the same voxels.
            return np.full(len(index), count // 2)
        return (uniform(seed, epoch, index, purpose) * count).astype(np.int64)

    if any(room):
        purposes = (WINDOW_T, WINDOW_Y, WINDOW_X)
        columns = [draw(purpose, free + 1) for purpose, free in zip(purposes, room, strict=True)]
        corners = np.stack(columns, axis=1).tolist()
        data, valid = (_windows(array, corners, wanted) for array in (data, valid))

    # A quarter turn of an oblong window would not fit into the batch.
    if not flips or epoch is None or wanted[1] != wanted[2]:
        return data, valid
    turns, mirrored = draw(TURN, 4).tolist(), draw(MIRROR, 2).tolist()
    data, valid = (turn_and_mirror(array, turns, mirrored, axes=(1, 2)) for array in (data, valid))
    return data, valid


def _windows(array: Tensor, corners: list[list[int]], size: tuple[int, ...]) -> Tensor:
    """[B, T, Y, X, F] to [B, *size, F], each sample from its corner (t, y, x) on."""
    parts = []
    for sample, corner in zip(array, corners, strict=True):
        region = tuple(
            slice(start, start + length) for start, length in zip(corner, size, strict=True)
        )
        parts.append(sample[region])
    return torch.stack(parts)


def sample_depth(
    index: Tensor, levels: int, share: float, *, seed: int, epoch: int
) -> Tensor | None:
    """Draw how many residual levels each sample is decoded from.

    So one model decodes from any number of its levels.

    Parameters
    ----------
    index
        int64 [B], sample numbers.
    levels
        Of the model.
    share
        Of samples that get an even draw of 1..levels; the others get all.
    seed, epoch
        Of the training.

    Returns
    -------
    Tensor or None
        int64 [B] in 1..levels; None for all levels of every sample.
    """
    if levels == 1 or share == 0:
        return None
    numbers = index.cpu().numpy()
    drawn = 1 + (uniform(seed, epoch, numbers, DEPTH) * levels).astype(np.int64)
    depth = np.where(uniform(seed, epoch, numbers, HAS_DEPTH) < share, drawn, levels)
    return torch.from_numpy(depth).to(index.device)
