"""From measured rows to what is printed and kept: the machine, the ratios the project is held to,
tables of text, the JSON.

A ratio is the median over rounds of two rows' rates in the same round, so that a slow minute hits
both.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.settings import BenchSettings

__all__ = ["lines", "machine", "ratio", "ratios", "table", "write_json"]

PACKAGES = (
    "tensor-warehouse",
    "torch",
    "numpy",
    "zarr",
    "numcodecs",
    "crc32c",
    "tensordict",
    "tensorstore",
    "xbatcher",
    "xarray",
    "webdataset",
    "litdata",
    "mosaicml-streaming",
    "ffcv",
    "opencv-python-headless",
    "simplejpeg",
)
# (row, against, wanted): the acceptance of the loader's issue. "{best}" stands for the faster of a
# peer's worker counts.
WANTED: tuple[tuple[str, str, float], ...] = (
    ("thread", "lz4 decode", 0.90),
    ("thread", "FFCV", 1.15),
    ("thread", "LitData{best}", 2.2),
    ("thread", "MosaicML Streaming{best}", 6.0),
    ("thread", "WebDataset{best}", 8.0),
    ("thread", "JPEG decode{best}", 30.0),
    ("thread, first epoch", "lz4 decode", 0.75),
    ("thread, verify=always", "lz4 decode", 0.75),
    ("spawn", "lz4 decode", 0.65),
    ("spawn", "np.memmap, {workers} workers", 2.5),
    ("thread, memory", "row take", 0.80),
    ("thread, compressor=none", "row take", 0.70),
    ("thread, compressor=none", "FFCV", 1.6),
    ("thread, stream", "lz4 decode", 0.50),
)
WANTED_BUILDS: tuple[tuple[str, float], ...] = (("ffcv", 1.3), ("litdata", 2.5))


def machine() -> dict[str, Any]:
    """CPU, cores this process may use, memory, kernel, and the versions of everything measured
    (None: not installed).
    """
    import psutil

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: of(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )


def ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
    """Median over rounds of row / other, paired by round.

    Of the medians where the rounds do not pair up.
    """
    if len(row["runs"]) == len(other["runs"]):
        pairs = zip(row["runs"], other["runs"], strict=True)
        return float(statistics.median(one / two for one, two in pairs))
    return float(row["median"] / other["median"])


def ratios(
    rows: Sequence[dict[str, Any]], builds: Sequence[dict[str, Any]], workers: int
) -> list[dict[str, Any]]:
    """{name, ratio, wanted, met} for every pair of which both were measured."""
    timed = {row["name"]: row for row in rows if row.get("median")}
    out = []
    for name, against, wanted in WANTED:
        if "{best}" in against:
            base = against.removesuffix("{best}")
            found = [
                timed[key]
                for key in (f"{base}, 0 workers", f"{base}, {workers} workers")
                if key in timed
            ]
            other = max(found, key=lambda row: row["median"], default=None)
        else:
            other = timed.get(against.format(workers=workers))
        if name in timed and other is not None:
            value = ratio(timed[name], other)
            out.append(
                {
                    "name": f"{name} / {other['name']}",
                    "ratio": round(value, 3),
                    "wanted": wanted,
                    "met": value >= wanted,
                }
            )
    built = {row["name"]: row for row in builds}
    for name, wanted in WANTED_BUILDS:
        if name in built and "ours" in built:
            value = ratio(built["ours"], built[name])
            out.append(
                {
                    "name": f"build / {name}'s writer",
                    "ratio": round(value, 3),
                    "wanted": wanted,
                    "met": value >= wanted,
                }
            )
    return out


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The timed rows as lines of text, fastest first within a group, with their share of the LZ4
    limit.
    """
    limit = next(
        (row["median"] for row in rows if row["name"] == "lz4 decode" and row.get("median")), None
    )
    head = (
        f"{'samples/s':<40}{'median':>9}{'min':>9}{'max':>9}{'of lz4':>8}"
        f"{'first s':>9}{'cold':>9}{'PSS MB':>8}{'disk MB':>9}"
    )
    lines = [head]
    for group in ("limit", "ours", "peer"):
        for row in sorted(
            (row for row in rows if row["group"] == group),
            key=lambda row: -(row.get("median") or 0),
        ):
            share = f"{row['median'] / limit:.2f}" if limit and row.get("median") else ""
            lines.append(
                f"{row['name']:<40}{_number(row, 'median')}{_number(row, 'min')}"
                f"{_number(row, 'max')}{share:>8}{_number(row, 'first_batch_s', 2)}"
                f"{_number(row, 'cold')}{_number(row, 'peak_pss_mb', 0, 8)}"
                f"{_number(row, 'disk_mb')}"
            )
    return lines


def lines(result: dict[str, Any]) -> list[str]:
    """Everything measured, as lines of text."""
    out = table(result["rows"]) if result["rows"] else []
    out += [
        f"build {row['name']:<20}{row['median']:>9,.0f} pictures/s ({row['min']:,.0f} to "
        f"{row['max']:,.0f}), {row['disk_mb']:,.0f} MB"
        for row in result["builds"]
    ]
    out += [
        f"{row['name']:<55}{row['ratio']:>8.2f}  wanted "
        f"{row['wanted']:.2f}{'' if row['met'] else '  NOT MET'}"
        for row in result["ratios"]
    ]
    out += [f"absent: {row['name']}: {row['reason']}" for row in result["absent"]]
    return out


def _number(row: dict[str, Any], key: str, digits: int = 0, width: int = 9) -> str:
    value = row.get(key)
    return f"{'' if value is None else format(value, f',.{digits}f'):>{width}}"


def write_json(result: dict[str, Any], settings: BenchSettings) -> Path:
    path = Path(settings.output) / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_suffix(".part")
    temp.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    os.replace(temp, path)
    return path
