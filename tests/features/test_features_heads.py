"""Heads on cached features, and the figures they are judged by, against independent readings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from torch.nn import functional

from features.heads.cached import Cached
from features.heads.head import make_head
from features.heads.scoring import check_same_features, restore_head, score_head
from features.heads.train import ablated, train_head
from features.metrics import (
    auroc,
    calibration_error,
    classification_metrics,
)
from features.settings import HeadSettings
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from utils.training.confusion import ConfusionMatrix
from warehouse.errors import ConfigError, StateError

FACTS = {"name": "tiny", "random": True, "weights_sha256": "ab", "preprocessing": {"size": [8, 8]}}


def clouds(count=60, classes=3, width=8, spread=0.4):
    """Gaussian clouds around one corner a class."""
    rng = np.random.default_rng(0)
    pooled, target = {}, {}
    for name in ("train", "val", "test"):
        wanted = np.arange(count) % classes
        rows = np.eye(width)[wanted] + spread * rng.standard_normal((count, width))
        pooled[name], target[name] = (
            torch.from_numpy(rows).float() * 1e-3 + 5,
            torch.from_numpy(wanted),
        )
    return Cached("v0", FACTS, tuple("abc")[:classes], pooled, target)


def test_figures_are_those_of_their_definitions():
    rng = np.random.default_rng(1)
    target, probability = rng.integers(0, 4, 200), rng.dirichlet(np.ones(4), 200)
    said = probability.argmax(axis=1)
    matrix = ConfusionMatrix.of(target, said, 4)
    assert matrix.counts[2, 3] == sum(t == 2 and s == 3 for t, s in zip(target, said, strict=True))
    hits = [
        2 * ((target == c) & (said == c)).sum() / ((target == c).sum() + (said == c).sum())
        for c in range(4)
    ]
    assert matrix.macro_f1 == pytest.approx(np.mean(hits))
    assert classification_metrics(probability, target)["accuracy"] == pytest.approx(
        (target == said).mean()
    )
    score, positive = probability[:, 0].round(1), target == 0
    u = mannwhitneyu(score[positive], score[~positive]).statistic
    assert auroc(score, positive) == pytest.approx(u / (positive.sum() * (~positive).sum()))


def test_calibration_error_is_zero_for_the_calibrated_and_the_gap_for_the_boaster():
    half = np.array([[0.5, 0.5 - 1e-9]] * 10)
    assert calibration_error(half, np.arange(10) % 2) == pytest.approx(0, abs=1e-6)
    sure = np.array([[0.9, 0.1]] * 10)
    assert calibration_error(sure, np.arange(10) % 2) == pytest.approx(0.4)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(2, 60),
    classes=st.integers(2, 5),
    digits=st.sampled_from([1, 2, 9]),
)
def test_figures_are_those_of_counting_one_by_one(seed, count, classes, digits):
    rng = np.random.default_rng(seed)
    target, rough = (
        rng.integers(0, classes, count),
        rng.dirichlet(np.ones(classes), count).round(digits) + 1e-3,
    )
    probability = rough / rough.sum(axis=1, keepdims=True)
    found = classification_metrics(probability, target)
    areas = []
    for c in range(classes):
        ones, zeros = probability[target == c, c], probability[target != c, c]
        if len(ones) and len(zeros):
            areas.append(
                np.mean([(one > zero) + (one == zero) / 2 for one in ones for zero in zeros])
            )
    assert found.get("auroc", -1) == pytest.approx(np.mean(areas) if areas else -1)
    said, top = probability.argmax(axis=1), probability.max(axis=1)
    gap = 0.0
    for low in range(15):
        inside = (top > low / 15) & (top <= (low + 1) / 15)
        if inside.any():
            gap += inside.mean() * abs((said == target)[inside].mean() - top[inside].mean())
    assert found["ece"] == pytest.approx(gap)
    scores = []
    for c in set(target) | set(said):
        right = ((said == c) & (target == c)).sum()
        precision, recall = right / max(1, (said == c).sum()), right / max(1, (target == c).sum())
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert found["macro_f1"] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_pytorch_s_cross_entropy(tmp_path, smoothing, weighted):
    cached = clouds()
    target = cached.target["train"].clone()
    target[:15] = 0  # classes of unequal size
    cached.target["train"] = target
    wanted = HeadSettings(
        epochs=1, batch_size=60, label_smoothing=smoothing, class_weights=weighted
    )
    seen: list[float] = []
    train_head(wanted, cached, tmp_path, log_epoch=lambda _, figures: seen.append(figures["loss"]))
    head = make_head(wanted, 8, 3)
    head.fit_scale(cached.pooled["train"])
    counts = target.bincount(minlength=3)
    weight = 60 / (3 * counts) if weighted else None
    with torch.no_grad():
        losses = functional.cross_entropy(
            head(head.scaled(cached.pooled["train"])),
            target,
            weight,
            reduction="none",
            label_smoothing=smoothing,
        )
    assert seen == [pytest.approx(float(losses.mean()), rel=1e-5)]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kind": "mlp"},
        {"mixup": 0.2, "noise": 0.1, "label_smoothing": 0.1, "class_weights": True},
    ],
)
def test_a_head_learns_clouds_twice_the_same(tmp_path, change):
    wanted = HeadSettings(epochs=30, batch_size=16, **change)
    one, again = (train_head(wanted, clouds(), tmp_path / name) for name in ("one", "again"))
    assert one["accuracy"] > 0.8
    one.pop("seconds"), again.pop("seconds")
    assert one == again
    assert (tmp_path / "one" / "confusion.png").stat().st_size > 1000
    first, second = (load_checkpoint(tmp_path / name).tensors for name in ("one", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulated_batches_are_one_big_batch(tmp_path):
    whole = train_head(HeadSettings(epochs=5, batch_size=60), clouds(), tmp_path / "whole")
    parts = train_head(
        HeadSettings(epochs=5, batch_size=20, accumulate=3), clouds(), tmp_path / "parts"
    )
    one, other = (
        load_checkpoint(tmp_path / name).tensors["head.body.weight"] for name in ("whole", "parts")
    )
    assert whole["best_epoch"] == parts["best_epoch"]
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_attention_finds_the_one_cell_that_tells(tmp_path):
    rng, pooled, target, spatial = np.random.default_rng(3), {}, {}, {}
    for name in ("train", "val"):
        wanted = np.arange(80) % 2
        cells = 0.3 * rng.standard_normal((80, 8, 4, 4))
        cells[np.arange(80), wanted, rng.integers(4, size=80), rng.integers(4, size=80)] += 4
        spatial[name], target[name] = torch.from_numpy(cells).half(), torch.from_numpy(wanted)
        pooled[name] = spatial[name].float().mean(dim=(2, 3))
    cached = Cached("v0", FACTS, ("a", "b"), pooled, target, spatial)
    assert (
        train_head(HeadSettings(kind="attention", epochs=30, batch_size=16), cached, tmp_path)[
            "accuracy"
        ]
        > 0.9
    )


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_trained_head_is_scored_again_with_the_same_figures(tmp_path, kind):
    cached = replace(clouds(), source="a" * 64)
    trained = train_head(
        HeadSettings(name="mine", kind=kind, epochs=5, class_weights=True), cached, tmp_path
    )
    saved = load_checkpoint(tmp_path)
    check_same_features(saved, cached)
    again = score_head(saved, cached, tmp_path / "score" / "confusion.png")
    assert {
        key: again[key] for key in ("name", "accuracy", "macro_f1", "auroc", "ece", "held_out")
    } == {key: trained[key] for key in ("name", "accuracy", "macro_f1", "auroc", "ece", "held_out")}
    assert (tmp_path / "score" / "confusion.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"encoder": FACTS | {"name": "other"}}, "another encoder .*expected tiny, found other"),
        ({"encoder": FACTS | {"weights_sha256": "0"}}, "another encoder .*expected ab, found 0"),
        ({"encoder": FACTS | {"preprocessing": {"size": [9, 9]}}}, "another preprocessing"),
        ({"class_names": ("a", "b", "d")}, "other classes"),
        ({"source": "b"}, "another store .*other_pictures true"),
    ],
)
def test_features_of_another_store_encoder_or_preprocessing_are_refused(tmp_path, change, match):
    cached = replace(clouds(), source="a")
    train_head(HeadSettings(epochs=1), cached, tmp_path)
    other = replace(cached, **change)
    with pytest.raises(StateError, match=match):
        check_same_features(load_checkpoint(tmp_path), other)
    if "source" in change:
        check_same_features(load_checkpoint(tmp_path), other, other_pictures=True)


def test_a_checkpoint_that_is_no_head_s_is_refused(tmp_path):
    save_checkpoint(tmp_path, {"head.x": torch.zeros(1)}, {"model": {"kind": "tiny"}})
    with pytest.raises(StateError, match=r"not of a head.*infer_view"):
        check_same_features(load_checkpoint(tmp_path), clouds())
    save_checkpoint(
        tmp_path,
        {"head.x": torch.zeros(1)},
        {"model": {"kind": "head-mlp", "width": 0, "hidden": 3, "classes": ["a", "b"]}},
    )
    with pytest.raises(StateError, match="width 0"):
        restore_head(load_checkpoint(tmp_path))


def test_early_stopping_ends_before_the_last_epoch(tmp_path):
    seen: list[int] = []
    train_head(
        HeadSettings(epochs=200, patience=3),
        clouds(spread=0.01),
        tmp_path,
        log_epoch=lambda epoch, _: seen.append(epoch),
    )
    assert len(seen) < 50


def test_ablations_are_runs_with_their_overrides():
    runs = ablated(HeadSettings(epochs=7))
    assert [(run.name, run.kind, run.epochs) for run in runs] == [
        ("linear", "linear", 7),
        ("mlp", "mlp", 7),
        ("mlp_mixup", "mlp", 7),
    ]
    assert [run.name for run in ablated(HeadSettings(name="mine", ablations=[]))] == ["mine"]


@pytest.mark.parametrize(
    "change",
    [{"kinds": "mlp"}, {"epochs": 0}, {"ablations": 3}, {"checkpoint": "x"}, {"features": "x"}],
)
def test_an_ablation_that_is_none_is_refused(change):
    with pytest.raises(ConfigError, match=r"ablation"):
        ablated(HeadSettings(ablations=[change]))


def test_attention_without_maps_says_how_to_make_them(tmp_path):
    with pytest.raises(StateError, match="feature_map true"):
        train_head(HeadSettings(kind="attention"), clouds(), tmp_path)
