"""Which split a picture belongs to, and in which order a split is baked.

The result depends on names, hashes and the seed alone. Pictures that share a group key, and
byte-identical pictures, form a group, and a group lies in one split: a model must not be tested on
a copy of what it learnt from. Split folders that the data set has are kept as they are, with a
warning where a group lies in several of them.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from warehouse.settings import SPLIT_NAMES, BuildSettings

__all__ = [
    "Assignment",
    "assign_splits",
    "given_split",
    "group_keys",
    "permuted",
    "split_by_group",
    "split_by_size",
]

# Also the folders of COCO, such as train2017.
GIVEN = re.compile(r"^(train|training|val|valid|validation|test|testing)(?:\d{4})?$", re.IGNORECASE)
BY_START = {"tr": "train", "va": "val", "te": "test"}


class HasSource(Protocol):
    """Anything with a path relative to the input root."""

    @property
    def source(self) -> str: ...


Record = TypeVar("Record", bound=HasSource)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The splits of some sources.

    Attributes
    ----------
    splits, groups
        For each source, in their order, its split and the key of its group.
    from_folders
        Whether the data set's own split folders were kept.
    warnings
        Remarks for the user, one line each.
    """

    splits: tuple[str, ...]
    groups: tuple[str, ...]
    from_folders: bool
    warnings: tuple[str, ...] = ()


def given_split(source: str) -> str | None:
    """Return the split that the first or second folder of a path names; None without one."""
    # Deeper folders are the data's own: a class "test" of photographs of tests is no split.
    for part in source.split("/")[:-1][:2]:
        match = GIVEN.match(part)
        if match:
            return BY_START[match[1][:2].lower()]
    return None


def assign_splits(
    sources: Sequence[str],
    sha256s: Sequence[str],
    settings: BuildSettings,
    strata: Sequence[int | None] | None = None,
) -> Assignment:
    """Keep the data set's split folders where there are several, else draw splits by group.

    Parameters
    ----------
    sources
        POSIX paths relative to the input root.
    sha256s
        Digest of each source.
    strata
        Class of each source; the shares of `settings.splits` then hold within each class. A group
        of several classes counts with that of its first source.
    """
    groups = group_keys(sources, sha256s, settings.group_pattern)
    folder_splits = [given_split(source) for source in sources]
    # A single split folder is a data set's only part, which still has to be divided.
    if len(set(folder_splits) - {None}) >= 2:
        splits = tuple(split or "train" for split in folder_splits)
        return Assignment(splits, groups, True, _warnings(folder_splits, splits, groups))

    # Each class is divided by itself, so that a rare one is not missing from a split by chance.
    members: dict[int | None, list[str]] = defaultdict(list)
    first: dict[str, int | None] = {}
    for group, stratum in zip(groups, strata or [None] * len(groups), strict=True):
        members[first.setdefault(group, stratum)].append(group)
    chosen: dict[str, str] = {}
    for part in members.values():
        chosen |= split_by_group(part, settings.splits, settings.seed)
    return Assignment(tuple(chosen[group] for group in groups), groups, False)


def _warnings(
    folder_splits: Sequence[str | None], splits: Sequence[str], groups: Sequence[str]
) -> tuple[str, ...]:
    warnings = []
    outside = sum(split is None for split in folder_splits)
    if outside:
        warnings.append(f"{outside} pictures lie outside the given split folders and go to train")
    seen: dict[str, set[str]] = defaultdict(set)
    for split, group in zip(splits, groups, strict=True):
        seen[group].add(split)
    straddling = sorted(group for group, where in seen.items() if len(where) > 1)
    if straddling:
        warnings.append(
            f"{len(straddling)} groups of copies of one picture straddle the given splits, such as"
            f" {straddling[0]}: scores will flatter"
        )
    return tuple(warnings)


def group_keys(
    sources: Sequence[str], sha256s: Sequence[str], pattern: str | None
) -> tuple[str, ...]:
    """Return the key of each source's group.

    Parameters
    ----------
    pattern
        Regular expression that is searched in the file name, then in its stem: group 1, or the
        whole match, is the key. Where it is None or finds nothing, the path is the key.

    Returns
    -------
    tuple
        Sources of equal content get one key, together with all that share a key with one of them.
    """
    compiled = re.compile(pattern) if pattern else None
    keys = [_key(source, compiled) for source in sources]
    # Union-find over keys: equal contents join the groups of their keys.
    parent: dict[str, str] = {key: key for key in keys}

    def find(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    first: dict[str, str] = {}
    for key, digest in zip(keys, sha256s, strict=True):
        one, other = find(first.setdefault(digest, key)), find(key)
        # The smaller name leads, whatever the order of the sources.
        parent[max(one, other)] = min(one, other)
    return tuple(find(key) for key in keys)


def split_by_group(groups: Sequence[str], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Assign whole groups to splits.

    In seeded order each group goes where most samples are still wanted; of equals to train, then
    val. Each split ends within one group's size of its share. A split that is left without a group
    although there are enough of them takes the smallest group of the split that has most.

    Parameters
    ----------
    groups
        The group of each sample.
    shares
        The share of each split; they add up to 1.

    Returns
    -------
    dict
        Group -> split.
    """
    return split_by_size(Counter(groups), shares, seed)


def split_by_size(sizes: Mapping[str, int], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Assign groups as `split_by_group` does, given the number of samples of each."""
    total = sum(sizes.values())
    wanted = {split: shares[split] * total for split in SPLIT_NAMES if shares.get(split, 0.0) > 0}
    # By hash rather than a random generator: one more group leaves the order of the others.
    order = sorted(sizes, key=lambda group: (_seeded(seed, group), group))
    chosen: dict[str, str] = {}
    for group in order:
        split = max(wanted, key=lambda name: wanted[name])
        chosen[group] = split
        wanted[split] -= sizes[group]
    if len(order) < len(wanted):
        return chosen

    # With few or very unequal groups the greedy choice can leave a split empty, on which nothing
    # could then be scored.
    for split in wanted:
        held = Counter(chosen.values())
        if not held[split]:
            richest = max(wanted, key=lambda name: held[name])
            candidates = [group for group in order if chosen[group] == richest]
            chosen[min(candidates, key=lambda group: sizes[group])] = split
    return chosen


def permuted(records: Sequence[Record], seed: int) -> list[Record]:
    """Return records in the order in which they are baked.

    The order is that of a hash of seed and source, so that any stored chunk is a random draw.
    """
    return sorted(records, key=lambda record: (_seeded(seed, record.source), record.source))


def _key(source: str, pattern: re.Pattern[str] | None) -> str:
    name = posixpath.basename(source)
    if pattern is not None:
        for text in (name, posixpath.splitext(name)[0]):
            match = pattern.search(text)
            if match:
                return (match[1] if match.re.groups else match[0]) or source
    return source


def _seeded(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{text}".encode()).digest()
