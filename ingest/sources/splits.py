"""Which split a picture belongs to, and in which order a split is baked.

Everything follows from names, hashes and the seed. Pictures that share a group key, and
byte-identical pictures, are one group and a group is in one split: copies of one picture must not
be learnt from and tested on. Split folders that the source gives are kept as they are, with a
warning where a group straddles them.
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

GIVEN = re.compile(r"^(train|training|val|valid|validation|test|testing)(?:\d{4})?$", re.IGNORECASE)


class HasSource(Protocol):
    @property
    def source(self) -> str: ...


Record = TypeVar("Record", bound=HasSource)


@dataclass(frozen=True, slots=True)
class Assignment:
    """splits, groups: one a source, in their order; given.

    Whether the source's own split folders were kept.
    """

    splits: tuple[str, ...]
    groups: tuple[str, ...]
    given: bool
    warnings: tuple[str, ...] = ()


def given_split(source: str) -> str | None:
    """train, val or test by the name of the first or second folder of a relative path, else None."""
    for part in source.split("/")[:-1][:2]:
        match = GIVEN.match(part)
        if match:
            return {"tr": "train", "va": "val", "te": "test"}[match[1][:2].lower()]
    return None


def assign_splits(
    sources: Sequence[str],
    sha256s: Sequence[str],
    settings: BuildSettings,
    strata: Sequence[int | None] | None = None,
) -> Assignment:
    """Given split folders where there is more than one, else `settings.splits` by seeded group.

    strata: each source's class; the shares then hold within each class. A group of several classes
    goes by the first.
    """
    groups = group_keys(sources, sha256s, settings.group_pattern)
    given = [given_split(source) for source in sources]
    if len(set(given) - {None}) < 2:
        members: dict[int | None, list[str]] = defaultdict(list)
        first: dict[str, int | None] = {}
        for group, stratum in zip(groups, strata or [None] * len(groups), strict=True):
            members[first.setdefault(group, stratum)].append(group)
        chosen: dict[str, str] = {}
        for part in members.values():
            chosen |= split_by_group(part, settings.splits, settings.seed)
        return Assignment(tuple(chosen[group] for group in groups), groups, False)
    warnings = []
    stray = sum(split is None for split in given)
    if stray:
        warnings.append(f"{stray} pictures lie outside the given split folders and go to train")
    splits = tuple(split or "train" for split in given)
    seen: dict[str, set[str]] = defaultdict(set)
    for split, group in zip(splits, groups, strict=True):
        seen[group].add(split)
    straddling = sorted(group for group, where in seen.items() if len(where) > 1)
    if straddling:
        warnings.append(
            f"{len(straddling)} groups of copies of one picture straddle the given splits, such as {straddling[0]}: scores will flatter"
        )
    return Assignment(splits, groups, True, tuple(warnings))


def group_keys(
    sources: Sequence[str], sha256s: Sequence[str], pattern: str | None
) -> tuple[str, ...]:
    """One key a source: what `pattern` finds in the file name, then in its stem (group 1, or the
    whole match), else the path.

    Sources of equal bytes get one key, with all that share a key with either of them.
    """
    compiled = re.compile(pattern) if pattern else None
    keys = [_key(source, compiled) for source in sources]
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
    """group -> split. In seeded order each group goes where most samples are still wanted (ties:
    train, val, test).

    Each split ends within one group's size of its share. A split left without a group although
    there are enough of them takes the smallest group of the split that has most.
    """
    return split_by_size(Counter(groups), shares, seed)


def split_by_size(sizes: Mapping[str, int], shares: dict[str, float], seed: int) -> dict[str, str]:
    """`split_by_group` of groups whose sizes are known."""
    total = sum(sizes.values())
    wanted = {
        split: shares.get(split, 0.0) * total for split in SPLIT_NAMES if shares.get(split, 0.0) > 0
    }
    order = sorted(sizes, key=lambda group: (_seeded(seed, group), group))
    chosen: dict[str, str] = {}
    for group in order:
        split = max(wanted, key=lambda name: wanted[name])
        chosen[group] = split
        wanted[split] -= sizes[group]
    if len(order) >= len(wanted):
        for split in wanted:
            held = Counter(chosen.values())
            if not held[split]:
                richest = max(wanted, key=lambda name: held[name])
                moved = min(
                    (group for group in order if chosen[group] == richest),
                    key=lambda group: sizes[group],
                )
                chosen[moved] = split
    return chosen


def permuted(records: Sequence[Record], seed: int) -> list[Record]:
    """The order in which a split's records are baked.

    By sha256 of seed and source, so that any chunk is a random draw.
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
