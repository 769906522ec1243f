"""Boxes are judged one by one, each ending up kept or dropped for a reason."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.pictures.box_cleaning import REASONS, clean_boxes, keep_largest, orient_boxes
from ingest.pictures.letterbox import plan_letterbox
from warehouse.format.schema import CLIPPED, DIFFICULT

SIZE = (100, 80)
PLAN = plan_letterbox(*SIZE, (40, 50), "letterbox")  # scale 1/2
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("box", "label", "reason"),
    [
        ((NAN, 0, 10, 10), 0, "nan"),
        ((0, 0, INF, 10), 0, "nan"),
        ((0, 0, 10, 10), -1, "unknown_class"),
        ((10, 0, 5, 10), 0, "reversed"),
        ((0, 9, 10, 5), 0, "reversed"),
        ((5, 5, 5, 10), 0, "zero_area"),
        ((5, 5, 10, 5), 0, "zero_area"),
        ((100, 0, 120, 10), 0, "outside"),
        ((-20, -20, -1, -1), 0, "outside"),
        ((0, 0, 1.9, 10), 0, "tiny"),
        ((99, 0, 130, 10), 0, "tiny"),
        ((10, 10, 20, 20), 0, "duplicate"),
    ],
)
def test_each_fault_has_its_reason(box, label, reason):
    clean = clean_boxes(
        np.array([(10, 10, 20, 20), box], np.float64), [0, label], [0, 0], SIZE, PLAN
    )
    assert clean.dropped == ((1, reason),)
    assert clean.boxes_xyxy.tolist() == [[10, 10, 20, 20]]


def test_a_box_of_exactly_one_canvas_pixel_is_kept():
    assert len(clean_boxes(np.array([[0.0, 0, 2, 2]]), [0], [0], SIZE, PLAN).labels) == 1


def test_equal_boxes_of_two_classes_are_no_duplicates():
    assert len(clean_boxes(np.array([[0.0, 0, 9, 9]] * 2), [0, 1], [0, 0], SIZE, PLAN).labels) == 2


@pytest.mark.parametrize(("outside", "flagged"), [(0.4, False), (0.5, True), (30, True)])
def test_clipping_is_flagged_beyond_rounding_noise(outside, flagged):
    clean = clean_boxes(np.array([[50, 40, 100 + outside, 60]]), [0], [DIFFICULT], SIZE, PLAN)
    assert clean.boxes_xyxy.tolist() == [[50, 40, 100, 60]]
    assert clean.flags.tolist() == [DIFFICULT | (CLIPPED if flagged else 0)]
    assert clean.clipped == flagged


NUMBERS = st.one_of(
    st.floats(-150, 250), st.sampled_from([NAN, INF, -INF, 0.0, 100.0, 80.0, 1e308])
)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.integers(-1, 2)), max_size=12))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_box_is_kept_or_dropped_once_and_kept_ones_are_sound(rows):
    boxes = np.array([row[:4] for row in rows], np.float64).reshape(-1, 4)
    clean = clean_boxes(boxes, [row[4] for row in rows], [0] * len(rows), SIZE, PLAN)
    gone = [at for at, _ in clean.dropped]
    assert len(set(gone)) == len(gone)
    assert len(gone) + len(clean.labels) == len(rows)
    assert {reason for _, reason in clean.dropped} <= set(REASONS)
    stays = [at for at in range(len(rows)) if at not in gone]
    assert clean.labels.tolist() == [rows[at][4] for at in stays]
    np.testing.assert_array_equal(clean.boxes_xyxy, np.clip(boxes[stays], 0, [*SIZE, *SIZE]))
    sides = clean.boxes_xyxy[:, 2:] - clean.boxes_xyxy[:, :2]
    assert (sides >= 2 - 1e-5).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_pixels(orientation):
    stored = np.zeros((30, 50), np.uint8)
    stored[4:11, 20:45] = 1
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored),
    }[orientation]
    y, x = np.nonzero(turned)
    box = orient_boxes(np.array([[20, 4, 45, 11]]), 50, 30, orientation)
    assert box.tolist() == [[x.min(), y.min(), x.max() + 1, y.max() + 1]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_leaves_a_reversed_box_reversed(orientation):
    box = orient_boxes(np.array([[45, 4, 20, 11], [20, 11, 45, 4]]), 50, 30, orientation)
    assert ((box[:, 2:] - box[:, :2]) < 0).any(axis=1).all()


def test_the_largest_boxes_are_kept_in_source_order():
    boxes = np.array(
        [[0, 0, 2, 2], [0, 0, 9, 9], [0, 0, 1, 1], [0, 0, 5, 5], [1, 1, 3, 3]], np.float64
    )
    assert keep_largest(boxes, 3).tolist() == [0, 1, 3]
