"""Runs rows and writers in processes of their own, in interleaved rounds, and gathers what they
say.

Rounds run forwards and backwards in turn, so that a machine that slows down slows everybody. Memory
is the PSS of the process tree, sampled in an epoch that is not timed; cold runs follow an eviction
whose success is checked page by page.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.catalogue import WRITERS, Row
from benchmarks.child import MARK
from benchmarks.data import ROOT, Work
from benchmarks.settings import BenchSettings

__all__ = ["evict", "measure_builds", "measure_rows", "run_job", "tree_memory"]

SAMPLE_EVERY_S = 0.05
COLD_PEERS_SKIPPED = {"jpeg"}


def run_job(settings: BenchSettings, job: dict[str, Any], *, watch: bool = False) -> dict[str, Any]:
    """The answers of one child, with `peak_*_mb` when watched; {"absent".

    Reason} when it failed, died or took too long.
    """
    text = json.dumps(job | {"settings": settings.model_dump(mode="json")})
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TQDM_DISABLE": "1",
    }
    with tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.child", text],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            env=env,
            start_new_session=True,
        )
        peaks: dict[str, float] = {}
        watcher = threading.Thread(target=_watch, args=(child, peaks), daemon=True)
        if watch:
            watcher.start()
        try:
            out, _ = child.communicate(timeout=settings.timeout)
        except subprocess.TimeoutExpired:
            out = MARK + json.dumps({"absent": f"took longer than {settings.timeout:.0f} s"})
        finally:
            _end_group(child)
        if watch:
            watcher.join()
        err.seek(0)
        last = (err.read().strip() or "it said nothing").split("\n")[-1][:200]
    answer: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith(MARK):
            answer |= json.loads(line.removeprefix(MARK))
    # What was said before a failure at exit stands.
    return (answer or {"absent": f"its process ended with {child.returncode}: {last}"}) | peaks


def _end_group(child: subprocess.Popen[str]) -> None:
    """Whatever the child left running in its session (workers of a crashed library)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def tree_memory(pid: int) -> dict[str, float] | None:
    """PSS of a process and all below it in MB: pss (all), private (anonymous and shared memory.

    What cannot be dropped). None off Linux.
    """
    total, private = 0, 0
    try:
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            try:
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            except OSError:
                continue
            kb = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
            total += kb["Pss"]
            private += kb.get("Pss_Anon", 0) + kb.get("Pss_Shmem", 0)
    except (psutil.Error, OSError):
        return None
    return {"pss": total / 1024, "private": private / 1024} if total else None


def _watch(child: subprocess.Popen[str], peaks: dict[str, float]) -> None:
    while child.poll() is None:
        now = tree_memory(child.pid)
        for name, value in (now or {}).items():
            key = f"peak_{name}_mb"
            peaks[key] = max(peaks.get(key, 0.0), round(value, 1))
        time.sleep(SAMPLE_EVERY_S)


def prepare_peers(work: Work, rows: Sequence[Row], log: Any) -> dict[str, str]:
    """Write the formats that are missing; data name -> why it could not be written."""
    failed: dict[str, str] = {}
    for name in dict.fromkeys(row.data for row in rows):
        if name in WRITERS and not work.path(name).exists():
            log.info(f"writing {name}")
            target = work.root / f".{name}"
            remove(target)
            said = run_job(work.settings, {"mode": "write", "name": name, "target": str(target)})
            if "seconds" in said:
                os.replace(target, work.path(name))
            else:
                failed[name] = said["absent"]
                remove(target)
    return failed


def measure_rows(
    work: Work, rows: Sequence[Row], log: Any
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(measured rows, absent ones with their reason).

    Checked once, then timed in interleaved rounds, then cold.
    """
    settings = work.settings
    failed = prepare_peers(work, rows, log)
    results: dict[str, dict[str, Any]] = {}
    absent: dict[str, str] = {}
    for row in rows:
        if row.data in failed:
            absent[row.name] = failed[row.data]
            continue
        said = run_job(settings, {"mode": "check", "name": row.name}, watch=True)
        if "absent" in said:
            absent[row.name] = said["absent"]
            log.info(f"absent: {row.name}: {said['absent']}")
        else:
            results[row.name] = said
    if "loaders" in settings.parts:
        runs = _rounds([row for row in rows if row.name in results], work, absent, log)
        for name in [name for name in results if name in absent]:
            del results[name]
        for name, answers in runs.items():
            if name in results:
                results[name] |= summarise(answers)
    if "cold" in settings.parts:
        for row in rows:
            if row.name in results and row.group != "limit" and row.peer not in COLD_PEERS_SKIPPED:
                results[row.name] |= _cold(work, row, log)
    shown = [row_facts(row, work) | results[row.name] for row in rows if row.name in results]
    return shown, [{"name": name, "reason": why} for name, why in absent.items()]


def row_facts(row: Row, work: Work) -> dict[str, Any]:
    disk = work.disk_bytes(row.data)
    return {
        "name": row.name,
        "group": row.group,
        "workers": row.workers,
        "note": row.note,
        "disk_mb": round(disk / 1e6, 1),
    }


def _rounds(
    rows: Sequence[Row], work: Work, absent: dict[str, str], log: Any
) -> dict[str, list[dict[str, Any]]]:
    answers: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for turn in range(work.settings.repeats):
        for row in rows if turn % 2 == 0 else reversed(rows):
            if row.name in absent:
                continue
            said = run_job(work.settings, {"mode": "time", "name": row.name})
            if "rate" in said:
                answers[row.name].append(said)
                log.info(
                    f"round {turn + 1}/{work.settings.repeats}  {row.name}: "
                    f"{said['rate']:,.0f} samples/s"
                )
            else:
                absent[row.name] = said["absent"]
                log.info(f"absent: {row.name}: {said['absent']}")
    return answers


def summarise(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, min, max and every run, samples/s; the median time to the first batch."""
    rates = [answer["rate"] for answer in answers]
    firsts = [
        answer["first_batch_s"] for answer in answers if answer.get("first_batch_s") is not None
    ]
    return {
        "median": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "runs": rates,
        "first_batch_s": statistics.median(firsts) if firsts else None,
    }


def _cold(work: Work, row: Row, log: Any) -> dict[str, Any]:
    left = evict(work.files(row.data))
    if left is None or left > 0.05:
        return {
            "cold": None,
            "cold_reason": "page cache could not be dropped"
            if left is None
            else f"{left:.0%} of it stayed cached",
        }
    said = run_job(work.settings, {"mode": "cold", "name": row.name})
    if "cold" in said:
        log.info(
            f"cold  {row.name}: {said['cold'] or 0:,.0f} samples/s, first batch "
            f"{said['cold_first_batch_s']:.2f} s"
        )
        return said
    return {"cold": None, "cold_reason": said["absent"]}


def evict(paths: Iterable[Path]) -> float | None:
    """Drop files from the page cache.

    The share of pages that stayed (0 is cold), None where that cannot be asked for.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    paths = [path for path in paths if path.stat().st_size]
    os.sync()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    left = resident(paths)
    if left is not None and left > 0.05:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("1\n")
            left = resident(paths)
        except OSError:
            pass
    return left


def resident(paths: Sequence[Path]) -> float | None:
    """Share of the files' pages that are in the page cache, by mincore(2)."""
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        return None
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    here = pages = 0
    for path in paths:
        with (
            open(path, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            view = np.frombuffer(mapped, np.uint8)
            marks = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
            if mincore(view.ctypes.data, len(view), marks.ctypes.data):
                return None
            here, pages = here + int((marks & 1).sum()), pages + len(marks)
            del view
    return here / max(1, pages)


def measure_builds(work: Work, log: Any) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Our build against the peers' writers.

    The same JPEGs, decoder, filter and size, `workers` each. pictures/s.
    """
    settings = work.settings
    names = [
        "ours",
        *(name for name in ("ffcv", "litdata", "mds", "webdataset") if settings.wants(name)),
    ]
    rates: dict[str, list[float]] = {name: [] for name in names}
    sizes: dict[str, float] = {}
    absent: dict[str, str] = {}
    target = work.root / ".build"
    for turn in range(settings.build_repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            if name in absent:
                continue
            remove(target)
            said = run_job(settings, {"mode": "write", "name": name, "target": str(target)})
            if "seconds" not in said:
                absent[name] = said["absent"]
                continue
            rates[name].append(settings.samples / said["seconds"])
            sizes[name] = (
                sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e6
            )
            log.info(
                f"build {turn + 1}/{settings.build_repeats}  {name}: "
                f"{rates[name][-1]:,.0f} pictures/s"
            )
    remove(target)
    rows = [
        {
            "name": name,
            "workers": settings.workers,
            "median": statistics.median(runs),
            "min": min(runs),
            "max": max(runs),
            "runs": runs,
            "disk_mb": round(sizes[name], 1),
        }
        for name, runs in rates.items()
        if runs
    ]
    return rows, [{"name": f"build: {name}", "reason": why} for name, why in absent.items()]


def remove(target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
