"""The U-Net and its task.

Shapes, checkpoints, loss and scores against their definitions, augmentation that moves masks along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from segmentation.settings import SegmentSettings, SegmentTraining
from segmentation.task import SegmentTask, augment_patches, segmentation_loss
from segmentation.unet import UNet, restore_unet
from utils.training.checkpoint import load_checkpoint, prefixed, save_checkpoint
from utils.training.task import seeded
from warehouse.errors import StateError

QUIET = {"turns": False, "elastic": 0.0, "contrast": 0.0, "brightness": 0.0}


def unet(**more: Any) -> UNet:
    with seeded(3):
        return UNet(**{"channels": 1, "classes": 2, "width": 4, "levels": 2, "stem": 2} | more)


def batch(count: int = 4, side: int = 16, channels: int = 1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (count, side, side), np.uint8)
    image = np.repeat(
        (mask * 120 + rng.integers(0, 100, mask.shape, np.uint8))[:, None], channels, axis=1
    )
    return {
        "image": torch.from_numpy(image),
        "mask": torch.from_numpy(mask),
        "index": torch.arange(count) + 7,
    }


@pytest.mark.parametrize(("stem", "levels"), [(1, 1), (1, 3), (2, 2), (4, 2)])
def test_every_pixel_gets_a_logit_of_every_class(stem: int, levels: int) -> None:
    model = unet(channels=3, classes=5, stem=stem, levels=levels)
    side = model.multiple
    said = model(torch.zeros(2, 3, 2 * side, 3 * side, dtype=torch.uint8))
    assert said.shape == (2, 5, 2 * side, 3 * side)
    assert torch.isfinite(said).all()


def test_a_patch_is_predicted_the_same_whatever_lies_in_its_batch() -> None:
    model = unet().eval()
    image = batch()["image"]
    with torch.inference_mode():
        torch.testing.assert_close(model(image)[2:3], model(image[2:3]), rtol=1e-4, atol=1e-5)


def saved(folder: Path, model: UNet, **change: Any) -> Path:
    save_checkpoint(
        folder, prefixed("average", model.state_dict()), {"model": model.describe() | change}
    )
    return folder


def test_a_checkpoint_gives_the_model_back(tmp_path: Path) -> None:
    model = unet(channels=3, classes=3, levels=3).eval()
    again = restore_unet(load_checkpoint(saved(tmp_path, model)))
    image = batch(channels=3)["image"]
    assert not again.training
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"kind": "vqvae"},
            r"not of a U-Net.*found kind 'vqvae'; .*compress_zarr.*train one with python "
            r"-m scripts\.segment_patches",
        ),
        ({"kind": "head-linear"}, "not of a U-Net.*found kind 'head-linear'"),
        ({"width": 10**6}, "not of a U-Net.*width 1000000"),
        ({"levels": "many"}, "not of a U-Net.*many"),
        ({"classes": 3}, "checkpoint"),
    ],
    ids=["of a VQ-VAE", "of a head", "too wide", "no number", "weights of another shape"],
)
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(StateError, match=words):
        restore_unet(load_checkpoint(saved(tmp_path, unet(), **change)))


def test_the_loss_is_cross_entropy_and_soft_dice_over_known_pixels() -> None:
    logits, mask = (
        torch.randn(3, 3, 8, 9, generator=torch.Generator().manual_seed(0)),
        torch.randint(0, 3, (3, 8, 9), dtype=torch.uint8),
    )
    mask[0, :3], mask[2] = 255, 255
    cross, dice = segmentation_loss(logits, mask)
    for at in range(2):
        known = mask[at] != 255
        flat, truth = logits[at][:, known].T.double(), mask[at][known].long()
        assert cross[at].item() == pytest.approx(
            functional.cross_entropy(flat, truth).item(), rel=1e-5
        )
        said = flat.softmax(dim=1).numpy()
        shares = [
            (2 * said[truth == c, c].sum() + 1) / (said[:, c].sum() + (truth == c).sum().item() + 1)
            for c in range(3)
        ]
        assert dice[at].item() == pytest.approx(1 - np.mean(shares), rel=1e-5)
    assert cross[2] == 0
    assert dice[2].item() == pytest.approx(0, abs=1e-6)


def test_unknown_pixels_and_padded_samples_move_no_weight() -> None:
    task = SegmentTask(SegmentTraining(width=4, levels=2, **QUIET), channels=1, classes=2)
    whole = batch()
    whole["mask"][:, :, 8:] = 255
    total, parts = task.loss(task.model, whole, 0)
    other = {**whole, "pad": torch.tensor([False, False, True, True])}
    part, _ = task.loss(task.model, other, 0)
    first, _ = task.loss(task.model, {key: value[:2] for key, value in whole.items()}, 0)
    assert part.item() == pytest.approx(first.item(), rel=1e-5)
    assert total.item() == pytest.approx(
        parts["cross_entropy"].item() + parts["soft_dice"].item(), rel=1e-5
    )
    head = torch.autograd.grad(task.model(whole["image"]).sum() * 0 + total, task.model.head.bias)[
        0
    ]
    assert torch.isfinite(head).all()


def test_held_out_scores_are_of_all_known_pixels_of_all_batches() -> None:
    task = SegmentTask(SegmentTraining(width=4, levels=2), channels=1, classes=2)
    data = batch(6)
    data["mask"][0, :5] = 255
    parts = [
        {key: value[:4] for key, value in data.items()},
        {key: value[3:] for key, value in data.items()},
    ]
    parts[1]["pad"] = torch.tensor(
        [True, False, False]
    )  # sample 3, which the first batch has already
    scores = task.evaluate(task.model.eval(), iter(parts))
    with torch.inference_mode():
        said = task.model(data["image"]).argmax(dim=1).numpy()
    truth = data["mask"].numpy()
    known = truth != 255
    for index in range(2):
        a, b = (said == index) & known, (truth == index) & known
        assert scores[f"dice_{index}"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert scores["dice"] == pytest.approx((scores["dice_0"] + scores["dice_1"]) / 2)


@pytest.mark.parametrize(
    "change", [{"turns": True}, {"elastic": 3.0}, {"turns": True, "elastic": 2.0}], ids=str
)
def test_a_mask_moves_as_its_picture_does(change: dict[str, Any]) -> None:
    """Pictures that are their masks stay so.

    Exactly under turns, but for a pixel at an edge under the warp.
    """
    settings = SegmentTraining(**QUIET | change)
    mask = torch.zeros(24, 32, 32, dtype=torch.uint8)
    mask[:, 4:15, 6:28] = 1
    mask[:, 20:, :9] = 1
    image, moved = augment_patches(mask.unsqueeze(1) * 200, mask, torch.arange(24), 2, settings)
    wrong = (image[:, 0] > 100) != (moved == 1)
    if not settings.elastic:
        assert not wrong.any()
    assert wrong.float().mean() < 0.03
    assert (moved != mask).float().mean() > 0.02, "something moved"
    assert set(moved.unique().tolist()) <= {0, 1}


def test_augmentation_follows_from_seed_epoch_and_sample_alone() -> None:
    settings = SegmentTraining(elastic=2.0)
    data = batch(8)
    before = {key: value.clone() for key, value in data.items()}
    image, mask = augment_patches(data["image"], data["mask"], data["index"], 3, settings)
    order = torch.tensor([5, 0, 6])
    again, masks = augment_patches(
        data["image"][order], data["mask"][order], data["index"][order], 3, settings
    )
    torch.testing.assert_close(again, image[order])
    torch.testing.assert_close(masks, mask[order])
    assert all(torch.equal(value, before[key]) for key, value in data.items()), (
        "what is given is not written to"
    )
    for other in ({"epoch": 4}, {"seed": 1}):
        changed = SegmentTraining(elastic=2.0, seed=other.get("seed", 0))
        assert not torch.equal(
            augment_patches(
                data["image"], data["mask"], data["index"], other.get("epoch", 3), changed
            )[0],
            image,
        )
    plain, _ = augment_patches(
        data["image"], data["mask"], data["index"], 3, SegmentTraining(**QUIET)
    )
    torch.testing.assert_close(plain, data["image"].float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"overlap": 64, "patch_size": 64}, "overlap 64 must be smaller than patch_size 64"),
        (
            {"patch_size": 100},
            r"patch_size 100 must be a multiple of 16 \(stem x 2\^\(levels - 1\)\)",
        ),
        ({"mask_values": {0: 0, 255: 0}}, "at least two classes"),
        ({"mask_values": {0: 0, 256: 1}}, r"values 0\.\.255"),
        ({"splits": {"train": 0.7}}, "add up to 1"),
        ({"epochs": None}, "max_minutes must say when to stop"),
    ],
    ids=["overlap", "multiple", "one class", "16 bit value", "splits", "no end"],
)
def test_settings_that_cannot_work_are_refused_at_once(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SegmentSettings(**change)
