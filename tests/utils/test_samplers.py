"""Epoch orders: coverage, chunks, determinism, ranks, resume.

Index arithmetic only: no store, no torch.
"""

from __future__ import annotations

import warnings
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.samplers import BatchSampler, ChunkBatchSampler, RandomBatchSampler, permutation
from warehouse.errors import ConfigError, StateError

pytestmark = pytest.mark.filterwarnings("ignore:batch_size")

options = st.fixed_dictionaries(
    {
        "shuffle": st.booleans(),
        "seed": st.integers(0, 2**40),
        "interleave": st.integers(1, 5),
        "chunks_per_batch": st.integers(1, 4),
    }
)
sizes = st.lists(st.integers(1, 20), min_size=1, max_size=12)
batch_sizes = st.integers(1, 25)


def epoch(sampler: BatchSampler, number: int = 0) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


def owner(chunk_sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(chunk_sizes)), chunk_sizes)


@given(sizes, batch_sizes, options, st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_sample_comes_once_an_epoch(
    chunk_sizes: list[int], batch_size: int, kw: dict[str, Any], number: int
) -> None:
    sampler = ChunkBatchSampler(chunk_sizes, batch_size, **kw)
    batches = epoch(sampler, number)
    assert sorted(chain(*batches)) == list(range(sum(chunk_sizes)))
    assert len(batches) == len(sampler)
    assert all(0 < len(batch) <= batch_size for batch in batches)


@given(sizes, batch_sizes, options)
@settings(max_examples=200, deadline=None)
def test_no_batch_leaves_its_chunks(
    chunk_sizes: list[int], batch_size: int, kw: dict[str, Any]
) -> None:
    of = owner(chunk_sizes)
    for batch in ChunkBatchSampler(chunk_sizes, batch_size, **kw):
        assert len(set(of[batch])) <= kw["chunks_per_batch"]


@given(sizes, batch_sizes, options)
@settings(max_examples=100, deadline=None)
def test_drop_last_gives_whole_batches_only(
    chunk_sizes: list[int], batch_size: int, kw: dict[str, Any]
) -> None:
    batches = list(ChunkBatchSampler(chunk_sizes, batch_size, drop_last=True, **kw))
    assert all(len(batch) == batch_size for batch in batches)
    flat = list(chain(*batches))
    assert len(set(flat)) == len(flat)


@given(sizes, batch_sizes, options, st.integers(1, 7), st.booleans())
@settings(max_examples=150, deadline=None)
def test_ranks_share_the_global_order(
    chunk_sizes: list[int], batch_size: int, kw: dict[str, Any], world: int, drop_last: bool
) -> None:
    alone = list(ChunkBatchSampler(chunk_sizes, batch_size, drop_last=drop_last, **kw))
    ranks = [
        ChunkBatchSampler(
            chunk_sizes, batch_size, drop_last=drop_last, rank=rank, world_size=world, **kw
        )
        for rank in range(world)
    ]
    plans = [list(sampler.batches(0)) for sampler in ranks]
    assert len({len(part) for part in plans}) == 1, "every rank makes the same number of steps"
    woven = [plan for turn in zip(*plans, strict=True) for plan in turn]
    real = [plan.indices.tolist() for plan in woven if not plan.pad]
    assert real == (alone[: len(alone) // world * world] if drop_last else alone)
    assert not drop_last or not any(plan.pad for plan in woven)


@given(sizes, batch_sizes, options, st.integers(1, 3), st.integers(1, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_a_state_continues_the_order_with_any_rank_count(
    chunk_sizes: list[int], batch_size: int, kw: dict[str, Any], before: int, after: int, data: Any
) -> None:
    alone = epoch(ChunkBatchSampler(chunk_sizes, batch_size, **kw), 2)
    stop = data.draw(st.integers(0, len(alone) // before))
    first = [
        ChunkBatchSampler(chunk_sizes, batch_size, rank=rank, world_size=before, **kw)
        for rank in range(before)
    ]
    seen: list[list[int]] = []
    iterators = []
    for sampler in first:
        sampler.set_epoch(2)
        iterators.append(iter(sampler))
    for _ in range(stop):
        seen += [next(iterator) for iterator in iterators]
    states = [sampler.state_dict() for sampler in first]
    assert all(state == states[0] for state in states), "a state is the same on every rank"
    second = [
        ChunkBatchSampler(chunk_sizes, batch_size, rank=rank, world_size=after, **kw)
        for rank in range(after)
    ]
    rest = []
    for sampler in second:
        sampler.load_state_dict(states[0])
        sampler.set_epoch(2)
        rest.append(list(sampler.batches(sampler.begin())))
    seen += [
        plan.indices.tolist() for turn in zip(*rest, strict=True) for plan in turn if not plan.pad
    ]
    assert seen == alone


@pytest.mark.parametrize("kind", [ChunkBatchSampler, RandomBatchSampler])
def test_resume_at_every_batch_of_an_epoch(kind: type[BatchSampler]) -> None:
    whole = epoch(kind([7, 7, 5], 3, seed=4), 1)
    for stop in range(len(whole) + 1):
        sampler = kind([7, 7, 5], 3, seed=4)
        sampler.set_epoch(1)
        iterator = iter(sampler)
        head = [next(iterator) for _ in range(stop)]
        other = kind([7, 7, 5], 3, seed=4)
        other.load_state_dict(sampler.state_dict())
        assert len(other) == len(whole) - stop
        assert head + list(other) == whole
        assert list(other) == whole, "iterating again starts the epoch anew"


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    def orders(seed: int) -> list[list[list[int]]]:
        return [epoch(ChunkBatchSampler([20, 20, 9], 6, seed=seed), number) for number in range(3)]

    assert orders(1) == orders(1)
    assert orders(1)[0] != orders(1)[1]
    assert orders(1)[0] != orders(2)[0]


def splitmix64(value: int) -> int:
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@given(st.integers(0, 60), st.integers(0, 2**63), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_permutation_sorts_by_splitmix64(size: int, first: int, second: int) -> None:
    base = splitmix64(splitmix64(first) ^ second)
    assert permutation(size, first, second).tolist() == sorted(
        range(size), key=lambda index: splitmix64((base + index) % 2**64)
    )


def test_the_order_is_the_one_of_earlier_releases() -> None:
    """Saved states must stay valid: this list may change only with FORMAT_VERSION."""
    assert list(ChunkBatchSampler([3, 2], 2, seed=7)) == [[4, 3], [1, 0], [2]]


def test_without_shuffle_and_lanes_the_order_is_the_store_s() -> None:
    assert list(ChunkBatchSampler([4, 3], 2, shuffle=False)) == [[0, 1], [2, 3], [4, 5], [6]]


def test_lanes_give_batches_in_turn() -> None:
    of = owner([4, 4, 4, 4])
    chunks = [
        int(of[batch[0]])
        for batch in ChunkBatchSampler([4, 4, 4, 4], 2, shuffle=False, interleave=2)
    ]
    assert chunks == [0, 1, 0, 1, 2, 3, 2, 3]


def test_ranks_read_disjoint_chunks_when_they_divide_interleave() -> None:
    of = owner([6] * 8)
    per_rank = [
        set(of[list(chain(*ChunkBatchSampler([6] * 8, 2, interleave=4, rank=rank, world_size=2)))])
        for rank in range(2)
    ]
    assert per_rank[0].isdisjoint(per_rank[1])


@given(st.integers(0, 300), st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_a_permutation_is_one(size: int, key: int) -> None:
    assert sorted(permutation(size, key, 1).tolist()) == list(range(size))


def test_the_permutation_leaves_no_neighbours_together() -> None:
    order = permutation(20_000, 5)
    assert abs(np.abs(np.diff(order)).mean() / 20_000 - 1 / 3) < 0.01, (
        "the mean distance of a full shuffle is n / 3"
    )


def test_a_random_sampler_covers_everything_and_says_what_it_costs() -> None:
    sampler = RandomBatchSampler([10] * 10, 7, seed=3)
    assert sorted(chain(*sampler)) == list(range(100))
    assert sampler.chunks_touched == pytest.approx(10 * (1 - 0.9**7))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": 2.5},
        {"interleave": 0},
        {"chunks_per_batch": 0},
        {"rank": 2, "world_size": 2},
        {"seed": -1},
    ],
    ids=str,
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ChunkBatchSampler([4, 4], **({"batch_size": 2} | wrong))


def test_options_without_meaning_are_refused_not_ignored() -> None:
    with pytest.raises(ConfigError, match="mean nothing"):
        RandomBatchSampler([4, 4], 2, interleave=2)


def test_a_batch_size_above_the_chunk_warns_and_names_shard_samples() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="shard_samples"):
            ChunkBatchSampler([4, 4], 5)


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 3},
        {"seed": 9},
        {"shuffle": False},
        {"interleave": 2},
        {"chunks_per_batch": 2},
        {"drop_last": True},
    ],
    ids=str,
)
def test_a_state_of_another_order_is_refused_by_name(other: dict[str, Any]) -> None:
    state = ChunkBatchSampler([8, 8], **({"batch_size": 2} | other)).state_dict()
    with pytest.raises(StateError, match=next(iter(other))):
        ChunkBatchSampler([8, 8], 2).load_state_dict(state)


@pytest.mark.parametrize(
    "state",
    [{}, {"epoch": "x"}, {"epoch": 0, "position": 10**9}, {"epoch": -1, "position": 0}],
    ids=str,
)
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    sampler = ChunkBatchSampler([8, 8], 2)
    with pytest.raises(StateError):
        sampler.load_state_dict((sampler.options() if state else {}) | state)


def test_a_state_of_another_sampler_is_refused() -> None:
    with pytest.raises(StateError, match="sampler"):
        RandomBatchSampler([8, 8], 2).load_state_dict(ChunkBatchSampler([8, 8], 2).state_dict())
