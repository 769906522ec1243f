"""Estimate the size and the duration of a build by baking a few of its samples in memory.

A build asks for the size before it writes anything, so that a disk that is too small is reported at
the start rather than after hours. What was given up: precision, since the samples that were tried
stand for all of them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from warehouse.errors import PictureError
from warehouse.format.inner_chunks import encode, parts_of
from warehouse.layouts.plan import Block, BuildPlan, LoadSample
from warehouse.write.bake import content_digest

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a build would write and how long it would take, scaled up from a few samples.

    Attributes
    ----------
    samples
        The number of samples of the plan.
    bytes
        The size of the encoded samples.
    seconds
        The time that the workers need.
    """

    samples: int
    bytes: int
    seconds: float


def estimate(plan: BuildPlan, load: LoadSample, *, workers: int, probe: int = 8) -> Estimate:
    """Bake about `probe` samples in memory and scale up to the whole plan.

    Samples that cannot be made are skipped: it is the build that reports them.
    """
    taken = plan.layout.probe(plan, probe)
    start = time.perf_counter()
    size = 0

    for split, payload in taken:
        try:
            loaded = load(payload)
        except PictureError:
            continue

        for arrays in loaded.samples if isinstance(loaded, Block) else [loaded[0]]:
            for spec in split.specs:
                parts = parts_of(arrays[spec.name], spec)
                size += sum(len(encode(part, spec.codec)) for part in parts)
            # For its time only, which is about a tenth of what baking a picture takes.
            content_digest(split.specs, arrays)

    share = plan.samples / max(1, len(taken))
    seconds = (time.perf_counter() - start) * share / max(1, workers)
    return Estimate(plan.samples, int(size * share), seconds)
