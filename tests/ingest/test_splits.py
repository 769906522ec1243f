"""Splits by group.

No group in two splits, shares within one group, the same for any order of the sources.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.sources.splits import assign_splits, given_split, group_keys, permuted, split_by_group
from warehouse.settings import BuildSettings

SHARES = st.sampled_from(
    [
        {"train": 0.8, "val": 0.1, "test": 0.1},
        {"train": 0.5, "val": 0.5},
        {"train": 0.9, "val": 0.1, "test": 0.0},
        {"train": 1.0},
    ]
)
GROUPS = st.lists(st.integers(1, 9), min_size=1, max_size=60)


@given(GROUPS, SHARES, st.integers(0, 5))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_each_split_gets_its_share_within_one_group(sizes, shares, seed):
    groups = [f"g{at}" for at, size in enumerate(sizes) for _ in range(size)]
    chosen = split_by_group(groups, shares, seed)
    assert set(chosen) == set(groups)
    held = Counter(chosen[group] for group in groups)
    wanted = {split: share for split, share in shares.items() if share > 0}
    assert set(held) <= set(wanted)
    if len(sizes) >= len(wanted):
        assert set(held) == set(wanted)
    # A group moved to an otherwise empty split may cost its giver one group more each.
    slack = max(sizes) * (1 if len(sizes) > 20 else len(wanted))
    for split, share in wanted.items():
        assert abs(held[split] - share * len(groups)) <= slack


def test_the_order_of_the_sources_and_other_splits_do_not_matter():
    groups = [f"g{at % 37}" for at in range(100)]
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    assert split_by_group(groups, shares, 3) == split_by_group(
        sorted(groups, reverse=True), shares, 3
    )
    assert split_by_group(groups, shares, 3) != split_by_group(groups, shares, 4)


@pytest.mark.parametrize(
    ("source", "split"),
    [
        ("train/a.jpg", "train"),
        ("images/train2017/a.jpg", "train"),
        ("valid/images/a.jpg", "val"),
        ("Val2017/a.jpg", "val"),
        ("test/a.jpg", "test"),
        ("train.jpg", None),
        ("x/y/train/a.jpg", None),
        ("training_data/a.jpg", None),
        ("testament/a.jpg", None),
    ],
)
def test_split_folders_are_known_by_name_up_to_one_level_down(source, split):
    assert given_split(source) == split


def assigned(sources, hashes=None, **options):
    return assign_splits(
        sources, hashes or [f"{at}" for at in range(len(sources))], BuildSettings(**options)
    )


def test_given_splits_are_kept_when_there_is_more_than_one():
    result = assigned(["train/a.jpg", "valid/b.jpg", "test/c.jpg"])
    assert result.from_folders
    assert result.splits == ("train", "val", "test")
    assert not result.warnings


def test_a_single_given_split_is_split_anew():
    result = assigned([f"train/{at}.jpg" for at in range(20)])
    assert not result.from_folders
    assert set(result.splits) == {"train", "val", "test"}


def test_pictures_outside_given_splits_go_to_train_with_a_warning():
    result = assigned(["train/a.jpg", "valid/b.jpg", "extra/c.jpg"])
    assert result.splits[2] == "train"
    assert "1 pictures lie outside" in result.warnings[0]


def test_copies_that_straddle_given_splits_are_kept_and_counted():
    result = assigned(
        ["train/p.rf.1a.jpg", "valid/p.rf.2b.jpg", "train/x.jpg", "valid/y.jpg"],
        ["1", "2", "3", "3"],
    )
    assert result.splits == ("train", "val", "train", "val")
    assert result.warnings[0].startswith("2 groups of copies")


def test_the_group_pattern_names_the_parent():
    keys = group_keys(
        ["train/dog_png.rf.0a1b.jpg", "train/dog_png.rf.ffff.jpg", "train/cat.jpg"],
        "123",
        BuildSettings().group_pattern,
    )
    assert keys == ("dog_png", "dog_png", "train/cat.jpg")


@pytest.mark.parametrize(
    ("pattern", "key"),
    [(r"^\d+", "12"), (r"_([a-z]+)$", "ab"), (None, "x/12_ab.jpg"), (r"nothing", "x/12_ab.jpg")],
)
def test_a_pattern_is_searched_in_the_name_and_then_in_the_stem(pattern, key):
    assert group_keys(["x/12_ab.jpg"], ["0"], pattern) == (key,)


def test_equal_bytes_unite_their_groups_with_all_their_members():
    keys = group_keys(
        ["a1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "c1.jpg"],
        ["1", "same", "same", "4", "5"],
        r"^[a-z]",
    )
    assert len(set(keys[:4])) == 1
    assert keys[4] == "c"


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), max_size=30),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_groups_are_the_connected_components_in_any_order(rows, random):
    sources = [f"{key}_{at}.jpg" for at, (key, _) in enumerate(rows)]
    hashes = [str(digest) for _, digest in rows]
    found = dict(zip(sources, group_keys(sources, hashes, r"^\d+"), strict=True))
    neighbours = defaultdict(set)
    for source, (key, digest) in zip(sources, rows, strict=True):
        neighbours["k", key].add(source)
        neighbours["h", digest].add(source)
    for start in sources:
        reached, edge = {start}, {start}
        while edge:
            edge = (
                set().union(*(members for members in neighbours.values() if members & edge))
                - reached
            )
            reached |= edge
        assert {other for other in sources if found[other] == found[start]} == reached
    shuffled = list(zip(sources, hashes, strict=True))
    random.shuffle(shuffled)
    again = dict(
        zip(
            [s for s, _ in shuffled],
            group_keys([s for s, _ in shuffled], [h for _, h in shuffled], r"^\d+"),
            strict=True,
        )
    )
    assert again == found


def test_the_baked_order_is_a_permutation_by_seed():
    records = [SimpleNamespace(source=f"{at}") for at in range(50)]
    first = permuted(records, 0)
    assert sorted(first, key=lambda record: int(record.source)) == records
    assert first == permuted(records[::-1], 0) != permuted(records, 1)
    assert first != records
