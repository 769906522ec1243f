"""Merge the probabilities of patches into those of one image, band by band, straight into Zarr.

The weight of a patch is a product of two ramps, one along y and one along x, divided by the sum of
the ramps over all patches at that pixel. So the weights over any pixel sum to one, also where the
last patches were shifted inward, and the borders of an image count fully. A row of patches is added
to a band of lines; lines that no later row reaches are finished and leave as complete Zarr chunks.
Memory holds the band, (patch_size + 256 lines) x width x classes float32, and 16 patches. Nothing
grows with the height of the image, at the price of an order: patches must come row by row.

    probability  f2 [class, y, x]
    label        u1 [y, x]
    truth        u1 [y, x], 255 where unknown; absent without a mask
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
Emit = Callable[[int, NDArray[np.float32], NDArray[np.uint8] | None], None]
"""First line, probability [classes, n, width], truth [n, width] or None."""
Patch = tuple[NDArray[Any], NDArray[np.uint8] | None]
"""Probability [classes, size, size], mask [size, size] or None."""
LINES = 256
"""Lines of a stored chunk of the result."""
COLUMNS = 1024
"""Columns of a stored chunk of the result."""


def axis_weights(
    offsets: Sequence[int], size: int, length: int, overlap: int, blend: Blend = "ramp"
) -> NDArray[np.float32]:
    """Return the weights of patches along one axis; over each pixel they sum to one.

    Parameters
    ----------
    offsets
        First pixel of each patch.
    size, length
        Pixels of a patch and of the axis.
    overlap
        Pixels over which a ramp rises.
    blend
        `ramp` rises from each end of a patch that is not an end of the image. With `constant` every
        patch over a pixel counts the same, as in `sliding_window_inference(mode="constant")` of
        MONAI.

    Returns
    -------
    array
        float32 [patches, size], in (0, 1].
    """
    # In float64, so that float32 weights sum to one as exactly as they can.
    raw = np.ones((len(offsets), size), np.float64)
    if blend == "ramp" and overlap:
        # In steps of 1 / (overlap + 1): neighbours at the regular stride sum to one already.
        rise = np.minimum(1.0, (np.arange(size) + 1) / (overlap + 1))
        for number, offset in enumerate(offsets):
            # At the ends of the image there is no neighbour to blend with.
            if offset > 0:
                raw[number] *= rise
            if offset + size < length:
                raw[number] *= rise[::-1]

    # But a last patch that was shifted inward overlaps its neighbour by more than `overlap`, so
    # the ramps are divided by what they sum to at each pixel.
    total = np.zeros(length, np.float64)
    for patch, offset in zip(raw, offsets, strict=True):
        total[offset : offset + size] += patch
    weights = [
        patch / total[offset : offset + size] for patch, offset in zip(raw, offsets, strict=True)
    ]
    return np.stack(weights).astype(np.float32)


class Stitcher:
    """Add patches in the order of `patch_boxes`, and hand out finished lines.

    Parameters
    ----------
    height, width
        Pixels of the image.
    size, overlap
        Pixels of a patch, and those that neighbouring patches share.
    classes
        Number of classes.
    emit
        Called for consecutive lines, LINES of them but for the last call. The arrays it receives
        are overwritten afterwards.
    blend
        See `axis_weights`.
    truth
        Whether masks are put together too.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        size: int,
        overlap: int,
        classes: int,
        emit: Emit,
        blend: Blend = "ramp",
        truth: bool = False,
    ) -> None:
        self.height, self.width, self.size = height, width, size
        self.rows = patch_offsets(height, size, overlap)
        self.columns = patch_offsets(width, size, overlap)
        self.weights_y = axis_weights(self.rows, size, height, overlap, blend)
        self.weights_x = axis_weights(self.columns, size, width, overlap, blend)
        lines = min(size + LINES, height)
        # Float32: sums of float16 products would lose the bits that decide between close classes.
        self.band = np.zeros((classes, lines, width), np.float32)
        self.truth = np.full((lines, width), MASK_PADDING, np.uint8) if truth else None
        self.emit, self.start, self.count = emit, 0, 0

    @property
    def patches(self) -> int:
        """Number of patches of the image."""
        return len(self.rows) * len(self.columns)

    def add(self, probability: NDArray[Any], mask: NDArray[np.uint8] | None = None) -> None:
        """Add the next patch.

        Parameters
        ----------
        probability
            [classes, size, size], of any float type.
        mask
            uint8 [size, size].
        """
        row, column = divmod(self.count, len(self.columns))
        y, x = self.rows[row] - self.start, self.columns[column]
        weights = self.weights_y[row][:, None] * self.weights_x[column]
        self.band[:, y : y + self.size, x : x + self.size] += weights * probability
        if self.truth is not None and mask is not None:
            self.truth[y : y + self.size, x : x + self.size] = mask
        self.count += 1
        if self.count % len(self.columns) == 0:
            # The next row of patches begins at its offset: no line before that changes any more.
            last = self.count == self.patches
            self._finish(self.height if last else self.rows[row + 1])

    def _finish(self, end: int) -> None:
        """Emit lines before `end`, which will not change any more, and move the band up."""
        # LINES at a time, the height of a stored chunk: a chunk that is written in two parts would
        # be read, decoded and encoded again.
        while end - self.start >= LINES or (end == self.height and self.start < end):
            count = min(LINES, end - self.start)
            known = None if self.truth is None else self.truth[:count]
            self.emit(self.start, self.band[:, :count], known)
            self.band[:, :-count] = self.band[:, count:]
            self.band[:, -count:] = 0
            if self.truth is not None:
                self.truth[:-count] = self.truth[count:]
                self.truth[-count:] = MASK_PADDING
            self.start += count


def stitch(
    patches: Iterable[Patch],
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
    """Write the Zarr group `target` from patches; it appears complete or not at all.

    Parameters
    ----------
    patches
        In the order of `patch_boxes`.
    attributes
        Of the group.

    Raises
    ------
    StoreError
        The number of patches is not that of the image.

    Notes
    -----
    Only one process at a time may write a target, and the caller sees to that: what another one
    began is removed. `stitch_pictures` holds a lock. For the other parameters see `Stitcher`.
    """
    # What a killed process left there is of no use: the band that it held in memory is gone.
    staging = target.with_name(f".staging-{target.name}")
    durable.remove_tree(staging)
    arrays = _create_arrays(staging, (height, width), classes, truth, attributes or {})

    def emit(y: int, probability: NDArray[np.float32], known: NDArray[np.uint8] | None) -> None:
        _write_lines(arrays, y, probability, known)

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
    _add_all(stitcher, patches, target)
    _publish(staging, target)
    return target


def _add_all(stitcher: Stitcher, patches: Iterable[Patch], target: Path) -> None:
    """Add `patches`; raise StoreError where they are more or fewer than those of the image."""
    for probability, mask in patches:
        if stitcher.count == stitcher.patches:
            raise StoreError(
                "there are more patches than the image has",
                where=target,
                expected=stitcher.patches,
            )
        stitcher.add(probability, mask)
    if stitcher.count != stitcher.patches:
        raise StoreError(
            "patches of the image are missing",
            where=target,
            expected=stitcher.patches,
            found=stitcher.count,
        )


def _create_arrays(
    folder: Path, shape: tuple[int, int], classes: int, truth: bool, attributes: dict[str, Any]
) -> dict[str, Any]:
    """Create a Zarr group; return its arrays by name."""
    import zarr

    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.attrs.update(attributes)
    chunk = (min(LINES, shape[0]), min(COLUMNS, shape[1]))

    def create(name: str, dtype: str, fill: float, classes: tuple[int, ...] = ()) -> Any:
        return group.create_array(
            name,
            shape=(*classes, *shape),
            dtype=dtype,
            chunks=(*classes, *chunk),
            dimension_names=("class", "y", "x") if classes else ("y", "x"),
            fill_value=fill,
            # Every chunk is a file, so that a missing one can be told from an empty one.
            config={"write_empty_chunks": True},
        )

    arrays = {
        "probability": create("probability", "float16", 0.0, (classes,)),
        "label": create("label", "uint8", 0),
    }
    if truth:
        arrays["truth"] = create("truth", "uint8", MASK_PADDING)
    return arrays


def _write_lines(
    arrays: dict[str, Any],
    y: int,
    probability: NDArray[np.float32],
    known: NDArray[np.uint8] | None,
) -> None:
    """Write finished lines, the first of which is line `y` of the image."""
    lines = slice(y, y + probability.shape[1])
    # The columns of one stored chunk at a time: a band as float16 would be half the band again.
    for x in range(0, probability.shape[2], COLUMNS):
        columns = slice(x, x + COLUMNS)
        part = probability[:, :, columns]
        arrays["probability"][:, lines, columns] = part.astype(np.float16)
        arrays["label"][lines, columns] = part.argmax(axis=0).astype(np.uint8)
        if known is not None:
            arrays["truth"][lines, columns] = known[:, columns]


def _publish(staging: Path, target: Path) -> None:
    """Make the files in `staging` durable, and give the folder its name."""
    # Zarr's local store never syncs: the files first, then the folders, then the rename.
    for path in staging.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    durable.fsync_tree(staging)
    durable.remove_tree(target)
    durable.replace(staging, target)


def open_stitched(path: Path) -> Any:
    """Open the Zarr group of a stitched image, read only."""
    import zarr

    return zarr.open_group(path, mode="r", zarr_format=3)
