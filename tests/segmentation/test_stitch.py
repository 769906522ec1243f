"""Stitching.

Weights that sum to one, bands against the whole picture at once, MONAI's constant blending, results
whole or absent.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from segmentation import stitch as stitching
from segmentation.patches import patch_boxes, patch_offsets
from segmentation.stitch import LINES, Stitcher, axis_weights, open_stitched, stitch
from warehouse.errors import StoreError

Grid = tuple[int, int, int, int]
few = settings(max_examples=30, deadline=None)
ROUNDING = 2e-5
"""Of sums in float32 over as many patches as may lie over a pixel.

Hundreds, where the overlap is nearly the patch.
"""


@st.composite
def grids(draw: Any, most: int = 50) -> Grid:
    """(height, width, size, overlap), also with overlaps of more than half a patch."""
    size = draw(st.integers(3, 24))
    return (
        draw(st.integers(size, most)),
        draw(st.integers(size, most)),
        size,
        draw(st.integers(0, size - 2)),
    )


def pieces(
    grid: Grid, classes: int = 2, seed: int = 0
) -> tuple[NDArray[np.float32], list[tuple[int, int, int, int]]]:
    """A random probability map for every patch of the grid [patches, classes, size, size], and the
    patches' boxes.
    """
    height, width, size, overlap = grid
    boxes = [box for _, _, box in patch_boxes(width, height, size, overlap)]
    raw = np.random.default_rng(seed).random((len(boxes), classes, size, size), np.float32)
    return raw / raw.sum(axis=1, keepdims=True), boxes


def merged(
    grid: Grid, parts: NDArray[Any], blend: Any = "ramp", masks: Any = None
) -> tuple[NDArray[Any], NDArray[Any] | None, list[int]]:
    """(probability [classes, height, width], truth, lines of each band) of a Stitcher."""
    height, width, size, overlap = grid
    out = np.full((parts.shape[1], height, width), np.nan, np.float32)
    known = None if masks is None else np.full((height, width), 7, np.uint8)
    starts: list[int] = []

    def emit(y: int, probability: NDArray[Any], truth: Any) -> None:
        starts.append(y)
        out[:, y : y + probability.shape[1]] = probability
        if known is not None:
            known[y : y + len(truth)] = truth

    stitcher = Stitcher(
        height,
        width,
        size=size,
        overlap=overlap,
        classes=parts.shape[1],
        emit=emit,
        blend=blend,
        truth=masks is not None,
    )
    assert stitcher.patches == len(parts)
    for at, part in enumerate(parts):
        stitcher.add(part, None if masks is None else masks[at])
    return out, known, [*starts, height]


@few
@given(grids(), st.sampled_from(["ramp", "constant"]))
def test_weights_sum_to_one_at_every_pixel(grid: Grid, blend: Any) -> None:
    _, length, size, overlap = grid
    offsets = patch_offsets(length, size, overlap)
    weights = axis_weights(offsets, size, length, overlap, blend)
    total = np.zeros(length)
    for offset, row in zip(offsets, weights, strict=True):
        total[offset : offset + size] += row
    assert (weights > 0).all()
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)


@few
@given(grids(), st.sampled_from(["ramp", "constant"]))
def test_patches_of_one_picture_give_the_picture_back(grid: Grid, blend: Any) -> None:
    """Also where the last patches were shifted inward and three or four overlap.

    Weights are a partition of one in two dimensions.
    """
    height, width, _, _ = grid
    picture = np.random.default_rng(1).random((3, height, width), np.float32)
    _, boxes = pieces(grid)
    found, _, _ = merged(
        grid, np.stack([picture[:, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes]), blend
    )
    np.testing.assert_allclose(found, picture, rtol=0, atol=ROUNDING)


def test_between_two_patches_weights_are_a_straight_line() -> None:
    first, second = axis_weights([0, 24], 32, 56, 8)
    rising = np.arange(1, 9) / 9
    np.testing.assert_allclose(second[:8], rising, rtol=1e-6)
    np.testing.assert_allclose(first[24:], rising[::-1], rtol=1e-6)
    assert (first[:24] == 1).all(), "the picture's own border counts fully"
    assert (second[8:] == 1).all()


@few
@given(grids(), st.sampled_from(["ramp", "constant"]), st.integers(1, 40))
def test_bands_are_the_whole_picture_merged_at_once(grid: Grid, blend: Any, lines: int) -> None:
    height, width, size, overlap = grid
    parts, boxes = pieces(grid)
    total, weight = np.zeros((2, height, width)), np.zeros((height, width))
    for part, (x1, y1, x2, y2) in zip(parts, boxes, strict=True):
        ramp = np.ones((size, size))
        if blend == "ramp":  # said anew: distance to each inner border, in pixels of the overlap
            for axis, (low, high, end) in enumerate(((y1, y2, height), (x1, x2, width))):
                near = np.full(size, overlap + 1.0)
                near = np.minimum(near, np.arange(1, size + 1) if low > 0 else near)
                far = np.minimum(
                    np.full(size, overlap + 1.0),
                    np.arange(size, 0, -1) if high < end else overlap + 1,
                )
                along = near * far
                ramp = ramp * (along[:, None] if axis == 0 else along[None])
        total[:, y1:y2, x1:x2] += part * ramp
        weight[y1:y2, x1:x2] += ramp
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "LINES", lines)
        found, _, starts = merged(grid, parts, blend)
    np.testing.assert_allclose(found, total / weight, rtol=0, atol=ROUNDING)
    assert all(after - before == lines for before, after in pairwise(starts[:-1]))
    assert 0 < starts[-1] - starts[-2] <= lines


@few
@given(
    st.integers(16, 60),
    st.integers(16, 60),
    st.sampled_from([0, 1, 2, 4, 7, 8, 12, 15]),
    st.integers(1, 5),
)
def test_constant_blending_is_monai_s(height: int, width: int, overlap: int, lines: int) -> None:
    """The same patches in the same order.

    The same bits where 1, 2, 4, ... patches overlap, to rounding where 3 or 6 do.
    """
    from monai.inferers import sliding_window_inference

    grid = (height, width, 16, overlap)
    parts, boxes = pieces(grid, classes=3)
    given_boxes: list[tuple[int, int]] = []
    place = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)

    def model(windows: torch.Tensor) -> torch.Tensor:
        corners = [divmod(int(at), width) for at in windows[:, 0, 0, 0]]
        found = parts[len(given_boxes) : len(given_boxes) + len(corners)]
        given_boxes.extend(corners)
        return torch.from_numpy(found)

    theirs = sliding_window_inference(
        place, (16, 16), 4, model, overlap=overlap / 16, mode="constant"
    )[0].numpy()
    assert given_boxes == [(y, x) for x, y, _, _ in boxes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "LINES", lines)
        ours, _, _ = merged(grid, parts, "constant")
    count = np.zeros((height, width), int)
    for x1, y1, x2, y2 in boxes:
        count[y1:y2, x1:x2] += 1
    exact = (count & (count - 1)) == 0
    np.testing.assert_array_equal(ours[:, exact], theirs[:, exact])
    np.testing.assert_allclose(ours, theirs, rtol=3e-7 * max(4, count.max()), atol=0)


@few
@given(grids(), st.integers(1, 30))
def test_masks_are_put_together_and_stay_unknown_where_there_are_none(
    grid: Grid, lines: int
) -> None:
    height, width, _, _ = grid
    parts, boxes = pieces(grid)
    mask = np.random.default_rng(2).integers(0, 2, (height, width), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stitching, "LINES", lines)
        _, known, _ = merged(grid, parts, masks=[mask[y1:y2, x1:x2] for x1, y1, x2, y2 in boxes])
        _, unknown, _ = merged(grid, parts, masks=[None] * len(boxes))
    np.testing.assert_array_equal(known, mask)
    assert unknown is not None
    assert (unknown == 255).all()


def written(target: Path, grid: Grid, parts: Any, **more: Any) -> Path:
    height, width, size, overlap = grid
    return stitch(
        parts, target, height=height, width=width, size=size, overlap=overlap, classes=2, **more
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_stitched_picture_is_a_zarr_group_of_probabilities_labels_and_truth(
    tmp_path: Path,
) -> None:
    grid = (LINES + 40, 90, 64, 16)
    parts, boxes = pieces(grid)
    masks = np.random.default_rng(3).integers(0, 2, (grid[0], grid[1]), np.uint8)
    cuts = [
        (part, masks[y1:y2, x1:x2]) for part, (x1, y1, x2, y2) in zip(parts, boxes, strict=True)
    ]
    group = open_stitched(
        written(tmp_path / "a.zarr", grid, cuts, truth=True, attributes={"source": "a.png"})
    )
    whole, _, _ = merged(grid, parts)
    np.testing.assert_array_equal(group["probability"][:], whole.astype(np.float16))
    np.testing.assert_array_equal(group["label"][:], whole.argmax(axis=0))
    np.testing.assert_array_equal(group["truth"][:], masks)
    assert group["probability"].metadata.dimension_names == ("class", "y", "x")
    assert group["probability"].chunks == (2, LINES, 90)
    assert group.attrs["source"] == "a.png"
    assert set(
        open_stitched(written(tmp_path / "b.zarr", grid, [(part, None) for part in parts]))
    ) == {"probability", "label"}


@pytest.mark.parametrize(("change", "words"), [(-1, "are missing"), (1, "more patches than")])
def test_a_wrong_number_of_patches_is_an_error_and_leaves_no_result(
    tmp_path: Path, change: int, words: str
) -> None:
    grid = (40, 50, 16, 4)
    parts, _ = pieces(grid)
    wrong = parts[:-1] if change < 0 else np.concatenate([parts, parts[:1]])
    with pytest.raises(StoreError, match=words):
        written(tmp_path / "a.zarr", grid, [(part, None) for part in wrong])
    assert not (tmp_path / "a.zarr").exists()


def test_stitching_that_broke_off_leaves_what_was_there_and_begins_anew(tmp_path: Path) -> None:
    grid = (2 * LINES, 80, 64, 16)
    parts, _ = pieces(grid)
    other, _ = pieces(grid, seed=1)
    written(tmp_path / "whole.zarr", grid, [(part, None) for part in parts])
    written(tmp_path / "a.zarr", grid, [(part, None) for part in other])
    before = files(tmp_path / "a.zarr")

    def torn() -> Iterator[Any]:
        yield from ((part, None) for part in parts[:-2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "a.zarr", grid, torn())
    assert files(tmp_path / "a.zarr") == before
    written(tmp_path / "a.zarr", grid, [(part, None) for part in parts])
    assert files(tmp_path / "a.zarr") == files(tmp_path / "whole.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "whole.zarr"]


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    peaks = []
    for height in (1024, 1024, 8192):  # the first one pays for imports
        grid = (height, 256, 64, 16)
        one = pieces((64, 64, 64, 16))[0][0]
        count = len(patch_offsets(height, 64, 16)) * len(patch_offsets(256, 64, 16))
        tracemalloc.start()
        written(tmp_path / f"{height}.zarr", grid, ((one, None) for _ in range(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1], peaks
