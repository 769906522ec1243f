"""The check of a plan before anything is baked.

Plans come from whoever knows the sources, also from layouts outside this project. A plan that
contradicts itself could be baked and published, and would fail, or give wrong samples, only when it
is read. Invariant: a plan that passes can be read by every reader.
"""

from __future__ import annotations

from collections.abc import Iterator

from warehouse.errors import BuildError
from warehouse.format.schema import ArraySpec
from warehouse.layouts.plan import BuildPlan, SplitPlan

__all__ = ["check_plan"]

RESERVED = ("index", "pad")
"""Names that a loader gives to arrays of its own."""


def check_plan(plan: BuildPlan) -> None:
    """Refuse a plan that contradicts itself.

    Raises
    ------
    BuildError
        Naming the split, the array and the rule.
    """
    if not plan.splits:
        raise BuildError("the plan has no split", where=plan.version)

    first = plan.splits[0]
    for split in plan.splits:
        for where, what, expected, found in _faults(split, first):
            raise BuildError(
                f"the plan contradicts itself: {what}",
                where=where,
                expected=str(expected),
                found=str(found),
            )


def _faults(split: SplitPlan, first: SplitPlan) -> Iterator[tuple[str, str, object, object]]:
    """Yield (where, rule, expected, found) for every rule that the split breaks."""
    if not split.specs:
        yield f"split {split.name}", "a split has arrays", "at least one", 0
        return

    samples, size = split.specs[0].shape[0], split.shard_samples
    count = -(-samples // size) if split.whole_chunks else samples
    for what in ("payloads", "digests", "rows"):
        found = len(getattr(split, what))
        # A cube plans a payload for each stored chunk, of which the last ones may be cut.
        if split.specs[0].grid is None and found != count:
            yield f"split {split.name}", f"one of `{what}` for each payload", count, found

    for spec in split.specs:
        where = f"split {split.name}, array {spec.name}"
        if spec.name in RESERVED:
            yield where, "the name belongs to the loader", f"not {' or '.join(RESERVED)}", spec.name
        if spec.shape[0] != samples:
            yield where, "all arrays of a split have the same samples", samples, spec.shape[0]
        # The sample index knows one size of chunk: another one would give other samples' values.
        if spec.chunk[0] != size:
            yield where, "all arrays of a split have the same chunk size", size, spec.chunk[0]
        if spec.grid is None:
            yield from _chunk_faults(where, spec)

    # The manifest describes arrays once for all splits.
    own, others = _described(split), _described(first)
    if own != others:
        yield f"split {split.name}", f"all splits have the arrays of {first.name}", others, own


def _chunk_faults(where: str, spec: ArraySpec) -> Iterator[tuple[str, str, object, object]]:
    row = spec.shape[1:]
    if spec.chunk[1:] != row:
        yield where, "a stored chunk holds whole samples", (spec.chunk[0], *row), spec.chunk
    # A sample without dimensions has nothing to cut: its array is stored plainly.
    if spec.inner is not None and (not row or spec.inner != (1, *row)):
        expected = (1, *row) if row else None
        yield where, "an inner chunk is one sample", expected, spec.inner


def _described(split: SplitPlan) -> list[tuple[object, ...]]:
    return [
        (spec.name, spec.dtype, spec.shape[1:], spec.inner is not None, spec.codec)
        for spec in split.specs
    ]
