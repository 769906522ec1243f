"""Held-out passes: batches are made once, kept in order, and the same as the loader's."""

from __future__ import annotations

import pytest
import torch
from cache_fakes import RandomCrop

from utils.caching.cached_passes import CachedPasses
from warehouse.errors import ConfigError


class Loader:
    """Batches of two as a function of (epoch, number); notes what it was made to compute."""

    def __init__(self, count=5):
        self.count, self.epoch, self.at, self.made = count, 0, 0, []

    def __len__(self):
        return self.count

    def set_epoch(self, epoch):
        self.epoch, self.at = epoch, self.at if epoch == self.epoch and self.at < self.count else 0

    def state_dict(self):
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state):
        self.epoch, self.at = state["epoch"], state["at"]

    def __iter__(self):
        while self.at < self.count:
            self.made.append(self.at)
            self.at += 1
            yield {
                "index": torch.tensor([2 * self.at, 2 * self.at + 1]),
                "x": torch.full((2, 100), self.at + 10.0 * self.epoch),
            }


def passes(loader, epoch=0):
    loader.set_epoch(epoch)
    return [float(batch["x"][0, 0]) for batch in loader]


def test_held_out_batches_are_read_once(caplog):
    caplog.set_level("INFO")
    loader = Loader()
    cached = CachedPasses(loader, None, 1 << 20, "held-out")
    assert passes(cached) == passes(cached) == passes(cached) == [1, 2, 3, 4, 5]
    assert loader.made == [0, 1, 2, 3, 4]
    assert "will cache 10 samples" in caplog.text
    assert "5 hits" in caplog.text


def test_a_pass_that_ends_early_goes_on_where_it_ended():
    loader = Loader()
    cached = CachedPasses(loader, True, 1 << 20, "held-out")
    for batch in cached:
        if batch["x"][0, 0] == 2:
            break
    assert passes(cached) == passes(cached) == [1, 2, 3, 4, 5]
    assert loader.made == [0, 1, 2, 3, 4]


def test_a_split_that_does_not_fit_is_left_alone_or_kept_in_part():
    left, part = Loader(), Loader()
    alone, cached = (
        CachedPasses(left, None, 2000, "held-out"),
        CachedPasses(part, True, 2200, "held-out"),
    )
    for _ in range(2):
        assert passes(alone) == passes(cached) == [1, 2, 3, 4, 5]
    assert left.made == [0, 1, 2, 3, 4] * 2
    assert part.made == [0, 1, 2, 3, 4, 2, 3, 4]


def test_another_epoch_goes_past_the_cache():
    cached = CachedPasses(Loader(), True, 1 << 20, "held-out")
    assert passes(cached, 0) == [1, 2, 3, 4, 5]
    assert passes(cached, 1) == [11, 12, 13, 14, 15]
    assert passes(cached, 0) == [1, 2, 3, 4, 5]


def test_a_split_that_the_loader_holds_decoded_is_kept_once_and_said_to_be(caplog):
    caplog.set_level("INFO")
    loader, asked = Loader(), Loader()
    loader.store = asked.store = "memory"
    cached, twice = (
        CachedPasses(loader, None, 1 << 20, "held-out"),
        CachedPasses(asked, True, 1 << 20, "held-out"),
    )
    for _ in range(2):
        assert passes(cached) == passes(twice) == [1, 2, 3, 4, 5]
    assert cached.cache is None
    assert twice.cache is not None
    assert caplog.text.count("will cache 10 samples, 0.0 MB: the loader holds them") == 1


def test_a_loader_with_a_random_augmentation_is_refused():
    loader = Loader()
    loader.augment = RandomCrop()
    assert CachedPasses(loader, None, 1 << 20, "held-out").wanted is False
    with pytest.raises(ConfigError, match="RandomCrop"):
        CachedPasses(loader, True, 1 << 20, "held-out")
