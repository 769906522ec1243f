"""Patches' probabilities merged into one picture's, row band by row band, straight into Zarr.

Each patch's weight is a product of two ramps, one along y and one along x, divided by the ramps'
sum over all patches at that place. So the weights of the patches over any pixel sum to one, also
where the last patches were shifted inward, and a picture's borders count fully. A row of patches is
added to a band of lines; lines that no later row reaches are finished and leave as whole Zarr
chunks. Memory: the band, (patch_size + 256 lines) x width x classes float32, and 16 patches:
nothing grows with the picture's height.

    probability  f2 [class, y, x]    label  u1 [y, x]    truth  u1 [y, x], 255 where unknown; absent without a mask
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segmentation.patches import patch_offsets
from warehouse.errors import StoreError
from warehouse.format import durable
from warehouse.settings import MASK_PADDING

__all__ = ["LINES", "Blend", "Stitcher", "axis_weights", "open_stitched", "stitch"]

Blend = Literal["ramp", "constant"]
LINES = 256
"""Lines of a stored chunk of the result."""
COLUMNS = 1024


def axis_weights(
    offsets: Sequence[int], size: int, length: int, overlap: int, blend: Blend = "ramp"
) -> NDArray[np.float32]:
    """Weights along one axis, float32 [patches, size]: over each of the `length` pixels those of
    its patches sum to one.

    ramp: rises over `overlap` pixels from each end that is not the picture's, then is divided by
    the sum. constant: every patch over a pixel counts the same, as
    `sliding_window_inference(mode="constant")` of MONAI does.
    """
    raw = np.ones((len(offsets), size), np.float64)
    if blend == "ramp" and overlap:
        rise = np.minimum(1.0, (np.arange(size) + 1) / (overlap + 1))
        for at, offset in enumerate(offsets):
            if offset > 0:
                raw[at] *= rise
            if offset + size < length:
                raw[at] *= rise[::-1]
    total = np.zeros(length, np.float64)
    for at, offset in enumerate(offsets):
        total[offset : offset + size] += raw[at]
    return np.stack(
        [raw[at] / total[offset : offset + size] for at, offset in enumerate(offsets)]
    ).astype(np.float32)


class Stitcher:
    """Adds patches, in the order of `patch_boxes`, and hands out finished lines. A picture of
    `height` x `width` pixels.

    emit(y, probability float32 [classes, n, width], truth uint8 [n, width] or None) is called for
    consecutive lines, n = LINES but for the last call; what it is given is overwritten after.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        size: int,
        overlap: int,
        classes: int,
        emit: Callable[..., None],
        blend: Blend = "ramp",
        truth: bool = False,
    ) -> None:
        self.height, self.width, self.size = height, width, size
        self.rows, self.columns = (
            patch_offsets(height, size, overlap),
            patch_offsets(width, size, overlap),
        )
        self.weights_y = axis_weights(self.rows, size, height, overlap, blend)
        self.weights_x = axis_weights(self.columns, size, width, overlap, blend)
        self.band = np.zeros((classes, min(size + LINES, height), width), np.float32)
        self.truth = np.full((self.band.shape[1], width), MASK_PADDING, np.uint8) if truth else None
        self.emit, self.start, self.count = emit, 0, 0

    @property
    def patches(self) -> int:
        return len(self.rows) * len(self.columns)

    def add(self, probability: NDArray[Any], mask: NDArray[np.uint8] | None = None) -> None:
        """The next patch: probability [classes, size, size], of any float type.

        Mask uint8 [size, size].
        """
        row, column = divmod(self.count, len(self.columns))
        y, x = self.rows[row] - self.start, self.columns[column]
        weights = self.weights_y[row][:, None] * self.weights_x[column]
        self.band[:, y : y + self.size, x : x + self.size] += weights * probability
        if self.truth is not None and mask is not None:
            self.truth[y : y + self.size, x : x + self.size] = mask
        self.count += 1
        if self.count % len(self.columns) == 0:
            last = self.count == self.patches
            self._finish(self.height if last else self.rows[row + 1])

    def _finish(self, end: int) -> None:
        """Lines before `end` will not change any more."""
        while end - self.start >= LINES or (end == self.height and self.start < end):
            count = min(LINES, end - self.start)
            self.emit(
                self.start, self.band[:, :count], None if self.truth is None else self.truth[:count]
            )
            for array, empty in (
                (self.band, 0),
                (None if self.truth is None else self.truth[None], MASK_PADDING),
            ):
                if array is not None:
                    array[:, :-count] = array[:, count:]
                    array[:, -count:] = empty
            self.start += count


def stitch(
    patches: Iterable[tuple[NDArray[Any], NDArray[np.uint8] | None]],
    target: Path,
    *,
    height: int,
    width: int,
    size: int,
    overlap: int,
    classes: int,
    blend: Blend = "ramp",
    truth: bool = False,
    attributes: dict[str, Any] | None = None,
) -> Path:
    """Write the Zarr group `target` from patches in the order of `patch_boxes`; it is there whole
    or not at all.

    One at a time a target, which is the caller's care: what another began is cleared away.
    `stitch_pictures` holds a lock. patches: (probability [classes, size, size], mask or None).
    Raises StoreError when their number is not the picture's.
    """
    import zarr

    staging = target.with_name(f".staging-{target.name}")
    durable.remove_tree(staging)
    group = zarr.open_group(staging, mode="w", zarr_format=3)
    group.attrs.update(attributes or {})
    shapes: dict[str, tuple[tuple[int, ...], str, tuple[str, ...], Any]] = {
        "probability": ((classes, height, width), "float16", ("class", "y", "x"), 0.0),
        "label": ((height, width), "uint8", ("y", "x"), 0),
    }
    if truth:
        shapes["truth"] = ((height, width), "uint8", ("y", "x"), MASK_PADDING)
    arrays = {
        name: group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(*shape[:-2], min(LINES, height), min(COLUMNS, width)),
            dimension_names=dims,
            fill_value=fill,
            config={"write_empty_chunks": True},
        )
        for name, (shape, dtype, dims, fill) in shapes.items()
    }

    def emit(y: int, probability: NDArray[np.float32], known: NDArray[np.uint8] | None) -> None:
        lines = slice(y, y + probability.shape[1])
        # A stored chunk's columns at a time: a whole band as float16 would be half the band again.
        for x in range(0, width, COLUMNS):
            part = probability[:, :, x : x + COLUMNS]
            arrays["probability"][:, lines, x : x + COLUMNS] = part.astype(np.float16)
            arrays["label"][lines, x : x + COLUMNS] = part.argmax(axis=0).astype(np.uint8)
            if known is not None:
                arrays["truth"][lines, x : x + COLUMNS] = known[:, x : x + COLUMNS]

    stitcher = Stitcher(
        height,
        width,
        size=size,
        overlap=overlap,
        classes=classes,
        emit=emit,
        blend=blend,
        truth=truth,
    )
    for probability, mask in patches:
        if stitcher.count == stitcher.patches:
            raise StoreError(
                "more patches than the picture has", where=target, expected=stitcher.patches
            )
        stitcher.add(probability, mask)
    if stitcher.count != stitcher.patches:
        raise StoreError(
            "patches of the picture are missing",
            where=target,
            expected=stitcher.patches,
            found=stitcher.count,
        )
    for path in staging.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    durable.fsync_tree(staging)
    durable.remove_tree(target)
    durable.replace(staging, target)
    return target


def open_stitched(path: Path) -> Any:
    """The zarr group of a stitched picture, read only."""
    import zarr

    return zarr.open_group(path, mode="r", zarr_format=3)
