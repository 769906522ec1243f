"""Detectors.

Shapes on odd canvases, what the loss ignores, AP against hand-made cases, and learning on a few
pictures.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as sized
from hypothesis import strategies as st

from detector.boxes import (
    canvas_to_source,
    cxcywh_to_xyxy,
    generalized_iou,
    pairwise_iou,
)
from detector.evaluate import DetectionTally
from detector.losses import LossWeights, big_loss, largest_box, make_truth, tiny_loss
from detector.model import Slots, make_model, to_float
from detector.settings import DetectorSettings
from detector.task import DataFacts, DetectorTask
from utils.training.loop import Trainer
from utils.training.ranks import Ranks
from utils.training.task import seeded
from warehouse.format.schema import CROWD, DIFFICULT, TRUNCATED

WEIGHTS = LossWeights()
STILL = {"flip_x": 0, "zoom": 0, "aspect": 0, "brightness": 0, "contrast": 0, "saturation": 0}
ALONE = Ranks(0, 1, torch.device("cpu"))


def picture_batch(count=6, side=64, slots=4, seed=0, boxes=None):
    """Bright rectangles on dark noise, `boxes` of them a picture (default.

    0, 1, 2, ... in turn), stored as a loader gives them.
    """
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 60, (count, 3, side, side)).astype(np.uint8)
    box, mask = np.zeros((count, slots, 4), np.float32), np.zeros((count, slots), bool)
    for at in range(count):
        for slot in range(at % (slots + 1) if boxes is None else boxes):
            low = generator.integers(0, side // 2, 2)
            high = low + generator.integers(side // 6, side // 2, 2)
            image[at, :, low[1] : high[1], low[0] : high[0]] = generator.integers(
                120, 255, (3, 1, 1)
            )
            box[at, slot] = np.concatenate([low, high]) / side
            mask[at, slot] = True
    batch = {
        "image": image,
        "box": box,
        "box_mask": mask,
        "box_flags": np.zeros((count, slots), np.uint8),
        "label": np.where(mask, 0, -1).astype(np.int16),
        "index": np.arange(count),
        "letterbox": np.tile(
            np.array([0.5, 0.5, 0, 0, 2 * side, 2 * side], np.float32), (count, 1)
        ),
    }
    return {key: torch.from_numpy(value) for key, value in batch.items()}


def model_of(kind="big", **more):
    with seeded(0):
        return make_model(kind=kind, **({"max_boxes": 4, "width": 8} | more))


def slots_of(boxes, scores, classes=None):
    probability = torch.tensor(scores).clamp(1e-6, 1 - 1e-6)
    classes = torch.zeros(*probability.shape, 0) if classes is None else torch.tensor(classes)
    return Slots(torch.tensor(boxes), torch.logit(probability), classes)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 70), (8, 8), (100, 40)])
@pytest.mark.parametrize(("kind", "classes"), [("big", 1), ("big", 3), ("tiny", 1)])
def test_any_canvas_gives_the_promised_slots(kind, classes, height, width):
    model = model_of(kind, max_boxes=7, class_count=classes).eval()
    wanted = 1 if kind == "tiny" else 7
    with torch.inference_mode():
        slots = model.slots(model(to_float(torch.zeros(2, 3, height, width, dtype=torch.uint8))))
    assert slots.box_xyxy.shape == (2, wanted, 4)
    assert slots.objectness.shape == (2, wanted)
    assert slots.classes.shape == (2, wanted, classes if classes > 1 else 0)
    assert 0 <= float(slots.box_xyxy.min()) <= float(slots.box_xyxy.max()) <= 1
    assert (slots.objectness[:, :-1] >= slots.objectness[:, 1:]).all()


def test_uint8_and_float_pictures_become_the_same_numbers():
    image = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    torch.testing.assert_close(to_float(image), to_float(image.float() / 255))
    assert float(to_float(image).min()) == -1
    assert float(to_float(image).max()) == pytest.approx(1)


@given(st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8))
@sized(max_examples=60, deadline=None)
def test_box_conversions_go_back_and_overlaps_stay_in_range(numbers):
    boxes = torch.tensor(numbers, dtype=torch.float64).view(2, 4)
    boxes = torch.cat(
        [torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])],
        dim=1,
    )
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(cxcywh_to_xyxy(torch.cat([centre, size], dim=1)), boxes)
    giou, iou = generalized_iou(boxes[:1], boxes[1:])
    assert -1 - 1e-6 <= float(giou) <= float(iou) + 1e-6 <= 1 + 2e-6
    assert float(iou) == pytest.approx(float(pairwise_iou(boxes[:1], boxes[1:])))


@given(st.floats(0.05, 3), st.floats(0.05, 3), st.integers(0, 50), st.integers(0, 50))
@sized(max_examples=60, deadline=None)
def test_boxes_return_to_the_source_picture_where_they_came_from(scale_x, scale_y, pad_x, pad_y):
    source = torch.tensor(
        [[[10.0, 20.0, 60.0, 45.0], [0.0, 0.0, 100.0, 80.0]]], dtype=torch.float64
    )
    scale, pad = torch.tensor([scale_x, scale_y] * 2), torch.tensor([pad_x, pad_y] * 2)
    canvas = (source * scale + pad) / torch.tensor([400.0, 300.0] * 2)
    back = canvas_to_source(
        canvas, torch.tensor([[scale_x, scale_y, pad_x, pad_y, 100, 80]]), (300, 400)
    )
    torch.testing.assert_close(back, source, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["big", "tiny"])
def test_a_batch_s_loss_is_the_sum_of_its_pictures_losses(kind):
    model, batch = model_of(kind, class_count=2).eval(), picture_batch()
    task = DetectorTask(DetectorSettings(model=kind, **STILL), DataFacts(4, ("a", "b"), (64, 64)))
    whole = task.loss(model, batch, 0)[0]
    alone = sum(
        task.loss(model, {key: value[at : at + 1] for key, value in batch.items()}, 0)[0]
        for at in range(6)
    )
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-3)


def test_repeats_and_boxes_that_are_ignored_teach_nothing_but_silence_nothing_either():
    model, batch = model_of().eval(), picture_batch(boxes=2)
    predicted = model(to_float(batch["image"]))
    plain = big_loss(predicted, make_truth(batch), WEIGHTS)[0]
    padded = batch | {"pad": torch.tensor([False] * 5 + [True])}
    first_five = {key: value[:5] for key, value in batch.items()}
    five = big_loss(model(to_float(first_five["image"])), make_truth(first_five), WEIGHTS)[0]
    torch.testing.assert_close(
        big_loss(predicted, make_truth(padded), WEIGHTS)[0], five, rtol=1e-4, atol=1e-3
    )
    truncated = batch | {"box_flags": torch.full_like(batch["box_flags"], TRUNCATED)}
    assert big_loss(predicted, make_truth(truncated), WEIGHTS)[0] == plain
    for flag in (CROWD, DIFFICULT):
        truth = make_truth(batch | {"box_flags": torch.full_like(batch["box_flags"], flag)})
        assert not truth.mask.any()
        assert truth.ignored.sum() == batch["box_mask"].sum()


def test_a_cell_on_an_ignored_box_is_not_background():
    batch = picture_batch(1, boxes=1)
    batch["box"][0, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    batch["box_flags"][:] = CROWD
    predicted = model_of().eval()(to_float(batch["image"]))
    assert big_loss(predicted, make_truth(batch), WEIGHTS)[0] == 0
    empty = batch | {"box_mask": torch.zeros_like(batch["box_mask"])}
    assert big_loss(predicted, make_truth(empty), WEIGHTS)[0] > 0


@pytest.mark.parametrize("kind", ["big", "tiny"])
def test_pictures_without_boxes_give_a_finite_loss_and_gradient(kind):
    model, batch = model_of(kind), picture_batch(boxes=0)
    predicted = model(to_float(batch["image"]))
    loss = (
        big_loss(predicted, make_truth(batch), WEIGHTS)[0]
        if kind == "big"
        else tiny_loss(predicted, largest_box(make_truth(batch)), WEIGHTS)[0]
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert all(
        torch.isfinite(parameter.grad).all()
        for parameter in model.parameters()
        if parameter.grad is not None
    )


def test_the_largest_box_is_kept_and_an_ignored_one_is_not():
    batch = picture_batch(2, boxes=3)
    batch["box"][0, :3] = torch.tensor([[0, 0, 0.2, 0.2], [0, 0, 0.9, 0.9], [0.1, 0.1, 0.5, 0.5]])
    batch["box_flags"][0, 1] = DIFFICULT
    truth = largest_box(make_truth(batch))
    assert truth.box_xyxy.shape == (2, 1, 4)
    torch.testing.assert_close(truth.box_xyxy[0, 0], torch.tensor([0.1, 0.1, 0.5, 0.5]))


def tally_of(batch, slots, classes=1):
    tally = DetectionTally(classes, slots.objectness.shape[1])
    tally.add(slots, batch)
    return tally.metrics()


def two_box_batch():
    batch = picture_batch(2, slots=2, boxes=2)
    batch["box"][:] = torch.tensor([[0.0, 0.0, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0]])
    return batch


def test_perfect_slots_score_one_and_silent_ones_nought():
    batch = two_box_batch()
    perfect = slots_of(batch["box"].tolist(), [[0.9, 0.8]] * 2)
    assert tally_of(batch, perfect)["ap50"] == pytest.approx(1)
    assert tally_of(batch, perfect)["ap"] == pytest.approx(1)
    nowhere = slots_of([[[0.3, 0.3, 0.31, 0.31]] * 2] * 2, [[0.9, 0.8]] * 2)
    assert tally_of(batch, nowhere)["ap50"] == 0


def test_average_precision_of_a_known_ranking_is_the_area_under_its_curve():
    # By score: right, wrong, right, wrong, and 4 true boxes: precision 1 up to recall 1/4, 2/3 up
    # to 2/4, then nothing.
    batch = two_box_batch()
    first, second, wrong = [0.0, 0.0, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0], [0.6, 0.0, 0.9, 0.1]
    slots = slots_of([[first, wrong], [second, wrong]], [[0.9, 0.8], [0.7, 0.6]])
    recall_points = np.linspace(0, 1, 101)
    expected = np.where(
        recall_points <= 0.25, 1.0, np.where(recall_points <= 0.5, 2 / 3, 0.0)
    ).mean()
    assert tally_of(batch, slots)["ap50"] == pytest.approx(expected, abs=1e-6)


def test_finding_or_missing_an_ignored_box_costs_nothing():
    batch = two_box_batch()
    batch["box_flags"][:, 1] = CROWD
    first, second = [0.0, 0.0, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0]
    assert tally_of(batch, slots_of([[second, first]] * 2, [[0.9, 0.8]] * 2))[
        "ap50"
    ] == pytest.approx(1)
    assert tally_of(batch, slots_of([[first, first]] * 2, [[0.9, 0.0]] * 2))[
        "ap50"
    ] == pytest.approx(1)


def test_class_mistakes_cost_map50_but_not_class_agnostic_ap50():
    batch = two_box_batch()
    batch["label"][:] = torch.tensor([0, 1])
    swapped = slots_of(batch["box"].tolist(), [[0.9, 0.8]] * 2, [[[-9.0, 9.0], [9.0, -9.0]]] * 2)
    metrics = tally_of(batch, swapped, classes=2)
    assert metrics["ap50"] == pytest.approx(1)
    assert metrics["map50"] == 0


def test_repeated_samples_are_scored_once():
    batch = two_box_batch()
    perfect = slots_of(batch["box"].tolist(), [[0.9, 0.8]] * 2)
    batch["index"] = torch.tensor([3, 3])
    assert tally_of(batch, perfect)["pictures"] == 1
    assert (
        tally_of(
            batch | {"index": torch.tensor([3, 4]), "pad": torch.tensor([False, True])}, perfect
        )["pictures"]
        == 1
    )


@pytest.mark.parametrize("boxes", [0, 1])
def test_a_split_without_any_truth_scores_nought_and_does_not_fail(boxes):
    batch = picture_batch(3, boxes=boxes)
    batch["box_flags"][:] = DIFFICULT
    slots = slots_of([[[0.1, 0.1, 0.5, 0.5]] * 4] * 3, [[0.9] * 4] * 3)
    assert tally_of(batch, slots) == {
        "ap50": 0.0,
        "map50": 0.0,
        "ap": 0.0,
        "mean_iou": 0.0,
        "pictures": 3,
    }


class OneBatch:
    """A loader of one batch, always the same."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1

    def __iter__(self):
        yield self.batch

    def set_epoch(self, epoch):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(("kind", "metric"), [("big", "ap50"), ("tiny", "mean_iou")])
def test_a_detector_learns_a_handful_of_pictures_by_heart(tmp_path, kind, metric):
    batch = picture_batch(8, boxes=1 if kind == "tiny" else 2, slots=2)
    settings = DetectorSettings(
        model=kind,
        epochs=90,
        lr=5e-3,
        warmup_steps=5,
        width=8,
        device="cpu",
        average=0.9,
        batch_size=8,
        evaluate_every=90,
        weight_decay=0,
        **STILL,
    )
    task = DetectorTask(settings, DataFacts(2, ("thing",), (64, 64)))
    result = Trainer(task, settings, OneBatch(batch), OneBatch(batch), tmp_path, ranks=ALONE).run()
    assert result[metric] > 0.75
