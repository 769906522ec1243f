"""Maps of text detection against the paper's definition, point by point."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.text.maps import TextMapSettings, draw_text_maps, offset_distance, shrink_polygon

FINE = TextMapSettings(stride=1, min_side=0)


def area_and_length(polygon):
    """By the shoelace formula, and Pythagoras."""
    corners = [*polygon, polygon[0]]
    pairs = list(itertools.pairwise(corners))
    return abs(sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairs)) / 2, sum(
        math.dist(a, b) for a, b in pairs
    )


def judge(polygon, x, y):
    """(inside, distance to the border) of a point.

    The winding angle, and the nearest point of each side, one after the other.
    """
    angle, nearest = 0.0, math.inf
    for (ax, ay), (bx, by) in zip(polygon, [*polygon[1:], polygon[0]], strict=True):
        angle += math.remainder(math.atan2(by - y, bx - x) - math.atan2(ay - y, ax - x), math.tau)
        dx, dy = bx - ax, by - ay
        at = min(1.0, max(0.0, ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy)))
        nearest = min(nearest, math.hypot(x - ax - at * dx, y - ay - at * dy))
    return abs(angle) > math.pi, nearest


@st.composite
def stars(draw):
    """A simple polygon around (20, 16), often not convex, within 15 pixels."""
    count = draw(st.integers(3, 8))
    turns = [(at + draw(st.floats(0.05, 0.95))) / count * math.tau for at in range(count)]
    radii = [draw(st.floats(4, 15)) for _ in range(count)]
    return np.array(
        [(20 + r * math.cos(t), 16 + r * math.sin(t)) for t, r in zip(turns, radii, strict=True)]
    )


@settings(deadline=None, max_examples=25)
@given(stars(), st.floats(0.1, 0.9))
def test_maps_are_those_of_the_paper_at_every_pixel(polygon, ratio):
    maps = draw_text_maps(
        [polygon],
        [False],
        (32, 40),
        within_xyxy=(0, 0, 40, 32),
        settings=TextMapSettings(stride=1, min_side=0, shrink_ratio=ratio),
    )
    area, length = area_and_length(polygon.tolist())
    distance = area * (1 - ratio**2) / length
    assert offset_distance(area, length, ratio) == pytest.approx(distance)
    arc = 1e-6 + 0.006 * distance  # the corners of a shrunk polygon are arcs of straight pieces
    for row in range(32):
        for column in range(40):
            inside, away = judge(polygon.tolist(), column + 0.5, row + 0.5)
            if abs(away - distance) > arc and not maps.too_small[0]:
                assert maps.probability[row, column] == (inside and away > distance)
                assert maps.threshold_mask[row, column] == (inside or away < distance)
                assert maps.threshold[row, column] == pytest.approx(
                    0.3 + 0.4 * max(0.0, 1 - away / distance), abs=1e-5
                )
            if maps.too_small[0] and away > 1e-6:
                assert maps.probability_mask[row, column] == (not inside)
    assert maps.probability_mask.all() != maps.too_small[0]


def test_a_rectangle_by_hand():
    """40 x 20: A = 800, L = 120, D = 5.6; the kernel is 28.8 x 8.8."""
    rectangle = np.array([(10.0, 10), (50, 10), (50, 30), (10, 30)])
    (ring,) = shrink_polygon(rectangle, offset_distance(800, 120, 0.4))
    assert ring.min(axis=0) == pytest.approx((15.6, 15.6))
    assert ring.max(axis=0) == pytest.approx((44.4, 24.4))
    maps = draw_text_maps([rectangle], [False], (40, 60), within_xyxy=(0, 0, 60, 40), settings=FINE)
    assert np.argwhere(maps.probability).min(axis=0).tolist() == [16, 16]
    assert np.argwhere(maps.probability).max(axis=0).tolist() == [23, 43]
    assert maps.probability.sum() == 8 * 28
    quarter = draw_text_maps(
        [4 * rectangle],
        [False],
        (160, 240),
        within_xyxy=(0, 0, 240, 160),
        settings=TextMapSettings(),
    )
    assert np.array_equal(quarter.probability, maps.probability), (
        "a quarter of the size, with an offset that scales along"
    )
    assert np.allclose(quarter.threshold, maps.threshold)
    assert maps.threshold.min() == np.float32(0.3)
    assert maps.threshold[20, 9] == pytest.approx(0.3 + 0.4 * (1 - 0.5 / 5.6))


def test_ignored_and_too_small_text_is_masked_whole_and_nothing_else():
    def square(x, y, side):
        return np.array([(x, y), (x + side, y), (x + side, y + side), (x, y + side)], np.float64)

    polygons = [square(8, 8, 40), square(60, 8, 16), square(60, 40, 7), square(84, 8, 12)]
    maps = draw_text_maps(
        polygons,
        [False, True, False, False],
        (64, 96),
        within_xyxy=(0, 0, 96, 64),
        settings=TextMapSettings(),
    )
    assert maps.too_small.tolist() == [False, False, True, False]
    masked = np.zeros((16, 24), bool)
    masked[2:6, 15:19] = True
    masked[10:12, 15:17] = True  # centres 42 and 46 are within 40..47
    assert np.array_equal(~maps.probability_mask, masked)
    assert not maps.probability[masked].any()
    assert not maps.threshold_mask[masked].any()
    assert maps.probability[:, :13].any()
    assert maps.probability[:, 20:].any()


def test_no_counted_text_is_taught_as_background():
    thin = np.array(
        [(8.0, 13.5), (80, 13.5), (80, 22), (8, 22)]
    )  # its kernel, 1.4 pixels high in the map, may miss every centre
    for shift in np.arange(0, 4, 0.25):
        maps = draw_text_maps(
            [thin + np.array((0, shift))],
            [False],
            (64, 96),
            within_xyxy=(0, 0, 96, 64),
            settings=TextMapSettings(),
        )
        assert maps.probability.any() != maps.too_small[0]
        assert maps.too_small[0] == (not maps.probability_mask.all())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(stars(), st.floats(-30, 30), st.floats(-30, 30), st.booleans()), max_size=4)
)
def test_text_that_leaves_the_picture_is_clipped_to_it(parts):
    polygons, ignore = (
        [star + np.array((x, y)) for star, x, y, _ in parts],
        [flag for *_, flag in parts],
    )
    maps = draw_text_maps(polygons, ignore, (32, 40), within_xyxy=(8, 4, 32, 28), settings=FINE)
    border = np.ones((32, 40), bool)
    border[4:28, 8:32] = False
    assert not maps.probability[border].any()
    assert maps.probability_mask[border].all()
    assert np.isfinite(maps.threshold).all()
    assert maps.threshold.min() >= np.float32(0.3)
    assert maps.threshold.max() <= np.float32(0.7)
    assert not (maps.too_small & np.array(ignore, bool)).any()
