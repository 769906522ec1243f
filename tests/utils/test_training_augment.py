"""Augmentation.

A pure function of (seed, epoch, sample index), boxes that follow their pixels, inputs left alone.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.augment import augment, draws, turn_and_mirror, uniform
from utils.training.settings import AugmentSettings
from warehouse.format.schema import DIFFICULT

NOTHING = {
    "flip_x": 0,
    "flip_y": 0,
    "zoom": 0,
    "aspect": 0,
    "brightness": 0,
    "contrast": 0,
    "saturation": 0,
}


def one_box_batch(count=6, side=96, seed=0):
    """A white rectangle on black, and its box."""
    generator = np.random.default_rng(seed)
    image, box = np.zeros((count, 3, side, side), np.uint8), np.zeros((count, 2, 4), np.float32)
    for at in range(count):
        low = generator.integers(20, 45, 2)
        high = low + generator.integers(12, 30, 2)
        image[at, :, low[1] : high[1], low[0] : high[0]] = 255
        box[at, 0] = np.concatenate([low, high]) / side
    mask = np.zeros((count, 2), bool)
    mask[:, 0] = True
    batch = {
        "image": image,
        "box": box,
        "box_mask": mask,
        "box_flags": np.zeros((count, 2), np.uint8),
        "index": np.arange(count) * 3 + seed,
    }
    return {key: torch.from_numpy(value) for key, value in batch.items()}


def test_with_everything_off_the_picture_is_only_made_float():
    batch = one_box_batch()
    changed = augment(batch, seed=1, epoch=2, settings=AugmentSettings(**NOTHING))
    torch.testing.assert_close(changed["image"], batch["image"].float() / 255)
    assert torch.equal(changed["box"], batch["box"])


def test_a_sample_looks_the_same_in_any_batch_and_otherwise_in_another_epoch():
    batch, options = one_box_batch(), AugmentSettings(flip_y=0.5)
    whole = augment(batch, seed=1, epoch=2, settings=options)
    order = torch.tensor([4, 0, 5])
    part = augment(
        {key: value[order] for key, value in batch.items()}, seed=1, epoch=2, settings=options
    )
    for key in ("image", "box", "box_mask", "box_flags"):
        torch.testing.assert_close(part[key], whole[key][order])
    assert not torch.equal(augment(batch, seed=1, epoch=3, settings=options)["box"], whole["box"])
    assert not torch.equal(augment(batch, seed=2, epoch=2, settings=options)["box"], whole["box"])


def test_what_is_given_is_not_written_to():
    batch = one_box_batch()
    batch["image"] = batch["image"].float() / 255
    before = {key: value.clone() for key, value in batch.items()}
    augment(batch, seed=1, epoch=2, settings=AugmentSettings())
    assert all(torch.equal(value, batch[key]) for key, value in before.items())


@pytest.mark.parametrize(("axis", "key"), [(3, "flip_x"), (2, "flip_y")])
def test_a_flip_mirrors_picture_and_box(axis, key):
    batch = one_box_batch()
    changed = augment(batch, seed=0, epoch=0, settings=AugmentSettings(**NOTHING | {key: 1}))
    torch.testing.assert_close(
        changed["image"], batch["image"].flip(axis).float() / 255, atol=1e-4, rtol=0
    )
    low, high = (0, 2) if key == "flip_x" else (1, 3)
    torch.testing.assert_close(changed["box"][:, 0, low], 1 - batch["box"][:, 0, high])
    assert (changed["box"][:, 1] == 0).all()


@given(st.integers(0, 1000), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_a_moved_rectangle_is_found_where_its_box_says(seed, epoch):
    options = AugmentSettings(
        **NOTHING | {"zoom": 0.4, "aspect": 0.2, "flip_x": 0.5, "flip_y": 0.5}
    )
    changed = augment(one_box_batch(4, seed=seed), seed=seed, epoch=epoch, settings=options)
    for image, box, mask in zip(changed["image"], changed["box"], changed["box_mask"], strict=True):
        assert mask[0]
        ys, xs = torch.nonzero(image[0] > 0.72, as_tuple=True)
        found = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 96
        assert (found - box[0]).abs().max() < 1.5 / 96


def test_a_box_moved_mostly_off_the_canvas_is_ignored_and_one_moved_off_is_dropped():
    batch = one_box_batch(64)
    batch["box"][:, 0] = torch.tensor([0.0, 0.0, 0.05, 0.05])
    changed = augment(batch, seed=3, epoch=0, settings=AugmentSettings(**NOTHING | {"zoom": 0.5}))
    gone, flagged = ~changed["box_mask"][:, 0], (changed["box_flags"][:, 0] & DIFFICULT) != 0
    assert gone.any()
    assert (flagged & ~gone).any()
    assert (~flagged & ~gone).any()
    assert (changed["box"][gone] == 0).all()


def test_draws_are_uniform_and_independent_of_each_other():
    index = np.arange(20_000)
    columns = np.stack(
        [
            uniform(0, 0, index, 0),
            uniform(0, 0, index, 1),
            uniform(0, 1, index, 0),
            uniform(1, 0, index, 0),
        ]
    )
    assert columns.min() >= 0
    assert columns.max() < 1
    for column in columns:
        assert np.abs(np.histogram(column, 10, (0, 1))[0] - 2000).max() < 220
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.03


def test_pictures_keep_their_range_under_the_strongest_jitter():
    options = AugmentSettings(brightness=0.9, contrast=0.9, saturation=0.9)
    image = augment(one_box_batch(), seed=0, epoch=0, settings=options)["image"]
    assert 0 <= float(image.min()) <= float(image.max()) <= 1


def test_draws_are_the_uniform_numbers_of_each_purpose():
    index = torch.tensor([5, 0, 9])
    drawn = draws(3, 2, index, (7, 1), torch.device("cpu"))
    for row, purpose in zip(drawn, (7, 1), strict=True):
        expected = torch.from_numpy(uniform(3, 2, index.numpy(), purpose)).float()
        assert torch.equal(row, expected)


@pytest.mark.parametrize("axes", [(-2, -1), (0, 1)])
def test_samples_are_turned_and_then_mirrored_one_by_one(axes):
    array = torch.arange(4 * 3 * 3).reshape(4, 3, 3)
    turns, mirrored = [0, 1, 2, 3], [True, False, True, True]
    moved = turn_and_mirror(array, turns, mirrored, axes=axes)
    for sample, turn, mirror, found in zip(array.numpy(), turns, mirrored, moved, strict=True):
        expected = np.rot90(sample, turn)
        assert (found.numpy() == (expected[:, ::-1] if mirror else expected)).all()
