"""Greedy matching against a walk over sorted pairs, and against the optimal assignment where greedy
reaches it.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from detector.boxes import pairwise_iou
from detector.matcher import NEVER, affinity, greedy_match, spread_match


def walked(scores: np.ndarray, mask: np.ndarray) -> list[int]:
    """The definition: all pairs, best first (ties.

    Lower truth, then lower prediction), one to one.
    """
    pairs = sorted(
        (-scores[t, p], t, p)
        for t in range(scores.shape[0])
        for p in range(scores.shape[1])
        if mask[t] and scores[t, p] > NEVER
    )
    matched, used = [-1] * scores.shape[0], set()
    for _, truth, prediction in pairs:
        if matched[truth] < 0 and prediction not in used:
            matched[truth] = prediction
            used.add(prediction)
    return matched


@st.composite
def score_tables(draw):
    truths, predictions, batch = (
        draw(st.integers(0, 6)),
        draw(st.integers(0, 9)),
        draw(st.integers(1, 3)),
    )
    # Few distinct values: ties are the hard part.
    values = st.sampled_from([NEVER, -1.5, -0.25, 0.125, 0.5, 0.75, 1.0])
    scores = draw(
        st.lists(
            values, min_size=batch * truths * predictions, max_size=batch * truths * predictions
        )
    )
    mask = draw(st.lists(st.booleans(), min_size=batch * truths, max_size=batch * truths))
    return np.array(scores, np.float32).reshape(batch, truths, predictions), np.array(
        mask, bool
    ).reshape(batch, truths)


@given(score_tables())
@settings(max_examples=200, deadline=None)
def test_greedy_match_equals_a_walk_over_the_sorted_pairs(table):
    scores, mask = table
    matched = greedy_match(torch.from_numpy(scores), torch.from_numpy(mask)).tolist()
    assert matched == [walked(scores[at], mask[at]) for at in range(len(scores))]


def random_boxes(generator: np.random.Generator, count: int) -> np.ndarray:
    low = generator.uniform(0, 0.8, (count, 2))
    return np.concatenate([low, low + generator.uniform(0.02, 0.2, (count, 2))], axis=1).astype(
        np.float32
    )


def numpy_iou(a: np.ndarray, b: np.ndarray) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0


def matched_by_overlap(predicted, truth, mask):
    return greedy_match(affinity(predicted, truth), mask)


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_boxes_are_matched_by_iou_and_by_distance_where_nothing_overlaps(seed, truths, predictions):
    generator = np.random.default_rng(seed)
    truth, predicted = random_boxes(generator, truths), random_boxes(generator, predictions)
    scores = np.array([[numpy_iou(t, p) or -np.abs(t - p).sum() for p in predicted] for t in truth])
    matched = matched_by_overlap(
        torch.from_numpy(predicted)[None],
        torch.from_numpy(truth)[None],
        torch.ones(1, truths, dtype=torch.bool),
    )
    assert matched[0].tolist() == walked(scores, np.ones(truths, bool))
    assert (matched >= 0).sum() == min(truths, predictions)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_greedy_is_the_optimal_assignment_when_each_truth_has_a_prediction_of_its_own(
    seed, truths, spare
):
    generator = np.random.default_rng(seed)
    places = generator.permutation(16)[:truths]
    corner = np.stack([places % 4, places // 4], axis=1) / 4
    truth = np.concatenate([corner + 0.02, corner + 0.2], axis=1)
    close = truth + generator.uniform(-0.01, 0.01, truth.shape)
    order = generator.permutation(truths + spare)
    predicted = np.concatenate([close, random_boxes(generator, spare) + 2.0])[order].astype(
        np.float32
    )
    truth = truth.astype(np.float32)
    iou = pairwise_iou(torch.from_numpy(truth), torch.from_numpy(predicted)).numpy()
    rows, columns = linear_sum_assignment(-iou)
    matched = matched_by_overlap(
        torch.from_numpy(predicted)[None],
        torch.from_numpy(truth)[None],
        torch.ones(1, truths, dtype=torch.bool),
    )
    assert rows.tolist() == list(range(truths))
    assert matched[0].tolist() == columns.tolist()


def test_padded_slots_match_nothing_and_take_nothing():
    predicted = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.3, 0.3]]])
    truth = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.3, 0.3]]])
    assert matched_by_overlap(predicted, truth, torch.tensor([[False, True]])).tolist() == [[-1, 1]]


def test_an_overlap_goes_before_any_distance():
    predicted = torch.tensor([[[0.0, 0.0, 0.1, 0.1], [0.9, 0.9, 1.0, 1.0]]])
    truth = torch.tensor([[[0.1, 0.1, 0.11, 0.11], [0.05, 0.05, 0.15, 0.15]]])
    pairs = affinity(predicted, truth)
    assert pairs[0, 0, 0] < 0 < pairs[0, 1, 0]
    assert matched_by_overlap(predicted, truth, torch.ones(1, 2, dtype=torch.bool)).tolist() == [
        [1, 0]
    ]


@given(score_tables(), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_spread_match_gives_a_prediction_to_at_most_one_truth_that_asked_for_it(table, count):
    scores, mask = table
    given_to = spread_match(torch.from_numpy(scores), torch.from_numpy(mask), count).numpy()
    assert given_to.shape == (scores.shape[0], scores.shape[2])
    for picture, prediction in zip(*np.nonzero(given_to >= 0), strict=True):
        truth = given_to[picture, prediction]
        assert mask[picture, truth]
        better = (scores[picture, truth] > scores[picture, truth, prediction]).sum()
        assert better < count
        assert scores[picture, truth, prediction] > NEVER
    for picture in range(len(scores)):
        assert all((given_to[picture] == truth).sum() <= count for truth in range(scores.shape[1]))
