"""python -m benchmarks.child JOB   <- JOB is JSON; run by benchmarks.measure only

One row, or one writer, in a process of its own: a peer that crashes, leaks or hangs harms nobody
else. Lines on stdout that begin with MARK carry the answers; whatever else a library prints is
ignored.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import count
from typing import Any

from benchmarks.settings import BenchSettings

__all__ = ["MARK", "main"]

MARK = "@bench "


def say(**fields: Any) -> None:
    print("\n" + MARK + json.dumps(fields), flush=True)


def main(text: str) -> None:
    job = json.loads(text)
    settings = BenchSettings(**job["settings"])
    start = time.perf_counter()
    try:
        import torch

        from benchmarks.catalogue import WRITERS, build_ours, catalogue
        from benchmarks.data import Work

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        work = Work(settings)
        if job["mode"] == "write":
            from pathlib import Path

            writer = WRITERS.get(job["name"], build_ours)
            target = Path(job["target"])
            work.sources  # noqa: B018 - listed before the clock starts
            start = time.perf_counter()
            said = writer(work, target, settings.workers, **job.get("options", {}))
            say(seconds=said if isinstance(said, float) else time.perf_counter() - start)
            return
        row = next(row for row in catalogue(settings) if row.name == job["name"])
        say(**{"check": check, "time": measure, "cold": cold}[job["mode"]](row, work, settings))
    except Exception as error:
        say(absent=reason(error))
    sys.stdout.flush()


def reason(error: Exception) -> str:
    """One line: the kind of failure and what it said."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {error.name}"
    return (
        text if type(error).__module__ == "warehouse.errors" else f"{type(error).__name__}: {text}"
    )


def check(row: Any, work: Any, settings: BenchSettings) -> dict[str, Any]:
    """One epoch with every pixel looked at, while the parent watches the memory."""
    import numpy as np

    from benchmarks.data import crc_sum

    reader = row.make(work, row.workers)
    samples = total = 0
    for batch in reader.epoch(0):
        array = np.asarray(batch)
        if (
            array.dtype != np.uint8
            or array.shape[1:] != work.shape[1:]
            or isinstance(batch, np.memmap)
        ):
            raise ValueError(
                f"delivers {type(batch).__name__} {array.dtype} {array.shape} instead of "
                f"uint8 {work.shape[1:]} in memory"
            )
        samples += len(array)
        total += crc_sum(array)
    truth = work.truth
    if (samples, total) != (truth["samples"], truth["crc_sum"]):
        raise ValueError(
            f"delivered {samples} samples with checksum {total}, expected "
            f"{truth['samples']} with {truth['crc_sum']}"
        )
    facts = reader.facts() if hasattr(reader, "facts") else {}
    say(checked=True)
    reader.close()
    return facts


def one_epoch(reader: Any, number: int) -> tuple[int, float | None]:
    """(samples, when the first batch was there)."""
    if hasattr(reader, "run"):
        return reader.run(number), None
    samples, first = 0, None
    for batch in reader.epoch(number):
        if first is None:
            first = time.perf_counter()
        samples += len(batch)
    return samples, first


def measure(row: Any, work: Any, settings: BenchSettings) -> dict[str, Any]:
    """A warm-up epoch, then whole epochs for at least `settings.seconds`. Rates are samples/s."""
    start = time.perf_counter()
    reader = row.make(work, row.workers)
    _, first = one_epoch(reader, 0)
    samples, seconds = 0, 0.0
    for number in count(1):
        if hasattr(reader, "renew"):
            reader.renew()
        at = time.perf_counter()
        done, _ = one_epoch(reader, number)
        seconds += time.perf_counter() - at
        samples += done
        if seconds >= settings.seconds:
            break
    if samples != number * settings.samples:
        raise ValueError(f"delivered {samples} samples in {number} epochs of {settings.samples}")
    say(
        rate=samples / seconds,
        epochs=number,
        first_batch_s=None if first is None else first - start,
    )
    reader.close()
    return {}


def cold(row: Any, work: Any, settings: BenchSettings) -> dict[str, Any]:
    """The first epoch of a process whose files are not in the page cache.

    Rate over what follows the first batch.
    """
    start = time.perf_counter()
    reader = row.make(work, row.workers)
    samples, first = one_epoch(reader, 0)
    end = time.perf_counter()
    if first is None:
        raise ValueError("a limit has no cold run")
    rest = samples - settings.batch_size
    say(
        cold=rest / (end - first) if rest > 0 else None,
        cold_first_batch_s=first - start,
        cold_seconds=end - start,
    )
    reader.close()
    return {}


if __name__ == "__main__":
    main(sys.argv[1])
