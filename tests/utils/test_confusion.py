"""The confusion matrix against counting sample by sample, and what it does with absent classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.training.confusion import ConfusionMatrix


def test_counts_are_those_of_counting_one_by_one_in_numpy_and_in_torch() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 20, (2, 7, 30)).astype(np.uint8)
    expected = np.zeros((20, 20), np.int64)
    for row, column in zip(truth.flat, predicted.flat, strict=True):
        expected[row, column] += 1
    by_numpy = ConfusionMatrix.of(truth, predicted, 20)
    by_torch = ConfusionMatrix.of(torch.from_numpy(truth), torch.from_numpy(predicted), 20)
    assert np.array_equal(by_numpy.counts, expected)
    assert np.array_equal(by_torch.counts, expected)


def test_batches_and_merged_matrices_add_up() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 3, (2, 90))
    at_once = ConfusionMatrix.of(truth, predicted, 3)
    batches, rest = ConfusionMatrix(3), ConfusionMatrix.of(truth[40:], predicted[40:], 3)
    batches.add(truth[:15], predicted[:15])
    batches.add(truth[15:40], predicted[15:40])
    batches.merge(rest)
    assert np.array_equal(batches.counts, at_once.counts)


def test_a_class_that_nobody_has_is_nan_and_left_out_of_the_means() -> None:
    matrix = ConfusionMatrix.of(np.array([0, 0, 1]), np.array([0, 1, 1]), 3)
    assert matrix.accuracy == pytest.approx(2 / 3)
    assert matrix.iou()[:2] == pytest.approx([1 / 2, 1 / 2])
    assert matrix.dice()[:2] == pytest.approx([2 / 3, 2 / 3])
    assert np.isnan(matrix.iou()[2])
    assert np.isnan(matrix.dice()[2])
    assert matrix.mean_iou == pytest.approx(1 / 2)
    assert matrix.macro_f1 == pytest.approx(2 / 3)


def test_without_samples_every_mean_is_zero() -> None:
    matrix = ConfusionMatrix(2)
    assert (matrix.accuracy, matrix.mean_iou, matrix.macro_f1) == (0.0, 0.0, 0.0)
