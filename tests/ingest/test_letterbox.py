"""The letterbox: a painted rectangle is where its box says, on the canvas and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ingest.pictures.box_cleaning import to_canvas
from ingest.pictures.letterbox import Geometry, letterbox_into, plan_letterbox
from warehouse.format.schema import GEOMETRY

MODES = st.sampled_from(["letterbox", "stretch"])
SIDES = st.integers(1, 400)
TARGETS = st.tuples(st.integers(8, 128), st.integers(8, 128))
STEADY = settings(max_examples=150, deadline=None, derandomize=True)


def to_source(box_norm, plan: Geometry, target):
    """The inverse of `to_canvas`, written out: canvas = source * scale + pad, in pixels."""
    pixels = np.asarray(box_norm, np.float64) * [target[1], target[0], target[1], target[0]]
    pad = [plan.pad_x, plan.pad_y, plan.pad_x, plan.pad_y]
    scale = [plan.scale_x, plan.scale_y, plan.scale_x, plan.scale_y]
    return (pixels - pad) / scale


@given(SIDES, SIDES, TARGETS, MODES)
@example(1, 400, (8, 8), "letterbox")
@STEADY
def test_the_picture_lies_centred_on_the_canvas_and_fills_one_side(
    raw_width, raw_height, target, mode
):
    height, width = target
    plan = plan_letterbox(raw_width, raw_height, target, mode)
    right, below = width - plan.pad_x - plan.new_width, height - plan.pad_y - plan.new_height
    assert min(plan.pad_x, plan.pad_y, right, below) >= 0
    assert 0 <= right - plan.pad_x <= 1
    assert 0 <= below - plan.pad_y <= 1
    assert plan.new_width == width or plan.new_height == height
    assert (plan.scale_x, plan.scale_y) == (
        plan.new_width / raw_width,
        plan.new_height / raw_height,
    )
    if mode == "stretch":
        assert (plan.new_width, plan.new_height, plan.pad_x, plan.pad_y) == (width, height, 0, 0)
    else:
        exact = min(width / raw_width, height / raw_height)
        assert abs(plan.new_width - max(1, raw_width * exact)) <= 0.5 + 1e-9
        assert abs(plan.new_height - max(1, raw_height * exact)) <= 0.5 + 1e-9


@given(
    st.integers(20, 300), st.integers(20, 300), TARGETS, MODES, st.randoms(use_true_random=False)
)
@STEADY
def test_a_painted_rectangle_is_found_on_the_canvas_and_back_within_half_a_source_pixel(
    raw_width, raw_height, target, mode, random
):
    x1, y1 = random.randint(0, raw_width - 10), random.randint(0, raw_height - 10)
    x2, y2 = random.randint(x1 + 5, raw_width), random.randint(y1 + 5, raw_height)
    source = np.zeros((raw_height, raw_width, 3), np.uint8)
    source[y1:y2, x1:x2] = 255
    plan = plan_letterbox(raw_width, raw_height, target, mode)
    canvas = np.full((3, *target), 7, np.uint8)
    letterbox_into(source, plan, canvas, pad_value=0)
    box = np.array([[x1, y1, x2, y2]], np.float64)
    back = to_source(to_canvas(box, plan, target).astype(np.float32), plan, target)
    assert np.abs(back - box).max() < 0.5
    # Light is kept by both filters up to the border: its sums along each axis measure edges to a
    # fraction of a pixel.
    light = canvas[1].astype(np.float64) / 255
    columns, rows = light.max(axis=0), light.max(axis=1)
    for profile, low, high, scale, size in (
        (columns, x1, x2, plan.scale_x, target[1]),
        (rows, y1, y2, plan.scale_y, target[0]),
    ):
        if (
            profile.max() < 0.9
        ):  # thinner than a canvas pixel along the other axis: the profile is no longer a step
            continue
        pad = plan.pad_x if size == target[1] and profile is columns else plan.pad_y
        found_low, found_high = _edges(profile / profile.max())
        tolerance = 0.5 * max(scale, 1.0) + 0.02
        assert abs(found_low - (low * scale + pad)) <= tolerance
        assert abs(found_high - (high * scale + pad)) <= tolerance


def _edges(profile: np.ndarray) -> tuple[float, float]:
    """Where a step rises and falls, from the light outside its brightest run."""
    full = np.flatnonzero(profile > 0.99)
    if not len(full):
        full = np.array([int(profile.argmax())])
    low, high = int(full[0]), int(full[-1])
    return low - profile[:low].sum(), high + 1 + profile[high + 1 :].sum()


@given(SIDES, SIDES, TARGETS, MODES)
@STEADY
def test_boxes_go_to_the_canvas_and_back_within_rounding(raw_width, raw_height, target, mode):
    plan = plan_letterbox(raw_width, raw_height, target, mode)
    boxes = np.array(
        [[0, 0, raw_width, raw_height], [raw_width / 3, raw_height / 7, raw_width / 2, raw_height]],
        np.float64,
    )
    norm = to_canvas(boxes, plan, target)
    assert norm.min() >= -1e-12
    assert norm.max() <= 1 + 1e-12
    np.testing.assert_allclose(
        to_source(norm, plan, target), boxes, atol=1e-9 * max(raw_width, raw_height)
    )
    assert np.abs(to_source(norm.astype(np.float32), plan, target) - boxes).max() < 0.5


def test_the_row_holds_the_six_columns_of_the_store():
    row = plan_letterbox(200, 100, (64, 64), "letterbox").row()
    assert row.dtype == np.float32
    assert dict(zip(GEOMETRY, row.tolist(), strict=True)) == pytest.approx(
        {
            "scale_x": 0.32,
            "scale_y": 0.32,
            "pad_x": 0,
            "pad_y": 16,
            "raw_width": 200,
            "raw_height": 100,
        }
    )


def test_the_border_has_the_padding_value_and_nothing_else_is_left_of_the_old_buffer():
    canvas = np.full((3, 64, 64), 200, np.uint8)
    letterbox_into(
        np.zeros((20, 40, 3), np.uint8),
        plan_letterbox(40, 20, (64, 64), "letterbox"),
        canvas,
        pad_value=114,
    )
    assert set(np.unique(canvas[:, :16])) == {114}
    assert set(np.unique(canvas[:, 48:])) == {114}
    assert not canvas[:, 16:48].any()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_float_canvases_carry_the_same_picture_over_255(dtype):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (50, 30, 3)).astype(np.uint8)
    plan = plan_letterbox(30, 50, (32, 32), "letterbox")
    whole, part = np.empty((3, 32, 32), np.uint8), np.empty((3, 32, 32), dtype)
    letterbox_into(source, plan, whole, 114)
    letterbox_into(source, plan, part, 114, dtype)
    np.testing.assert_allclose(
        part.astype(np.float64), whole / 255.0, atol=1e-3 if dtype == "float16" else 1e-6
    )


def test_shrinking_averages_areas_where_sampling_would_alias():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    canvas = np.empty((3, 16, 16), np.uint8)
    letterbox_into(stripes, plan_letterbox(64, 64, (16, 16), "letterbox"), canvas, 0)
    assert set(np.unique(canvas)) <= {127, 128}


def test_a_stretch_that_shrinks_one_axis_still_averages_along_it():
    stripes = np.zeros((16, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    canvas = np.empty((3, 64, 16), np.uint8)
    letterbox_into(stripes, plan_letterbox(64, 16, (64, 16), "stretch"), canvas, 0)
    assert set(np.unique(canvas)) <= {127, 128}
