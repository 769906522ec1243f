"""All parts of a benchmark run in turn, and their result as files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from benchmarks import bench_report
from benchmarks.catalogue import catalogue
from benchmarks.chart import draw_chart
from benchmarks.data import Work
from benchmarks.measure import measure_builds, measure_rows
from benchmarks.scale import measure_scale
from benchmarks.settings import BenchSettings
from benchmarks.shuffle import measure_shuffle

__all__ = ["run_suite", "write_result"]


def run_suite(bench: BenchSettings, log: logging.Logger) -> dict[str, Any]:
    """Measure the parts that the settings ask for; the result as it goes into bench.json."""
    machine = bench_report.machine()
    versions = ", ".join(f"{name} {each}" for name, each in machine["versions"].items() if each)
    log.info(
        "%s, %d cores, load %s; %s", machine["cpu"], machine["cores"], machine["load"], versions
    )
    work, rows = Work(bench), catalogue(bench)
    wanted = {row.data for row in rows}
    if "shuffle" in bench.parts:
        wanted.add("quality")
    work.prepare(wanted, log)

    timed: list[dict[str, Any]] = []
    builds: list[dict[str, Any]] = []
    absent: list[dict[str, str]] = []
    if {"loaders", "cold"} & set(bench.parts):
        timed, absent = measure_rows(work, rows, log)
    if "build" in bench.parts:
        builds, more = measure_builds(work, log)
        absent += more
    limits = {
        row["name"]: row["median"] for row in timed if row["group"] == "limit" and "median" in row
    }
    return {
        "rows": timed,
        "limits": limits,
        "absent": absent,
        "ratios": bench_report.ratios(timed, builds, bench.workers),
        "builds": builds,
        "shuffle": measure_shuffle(work, log) if "shuffle" in bench.parts else [],
        "scale": measure_scale(work.root / ".scale", log) if "scale" in bench.parts else None,
        "machine": machine,
        "settings": bench.model_dump(mode="json"),
    }


def write_result(result: dict[str, Any], bench: BenchSettings) -> dict[str, str]:
    """Write bench.json and, where rows were timed, bench.png; their paths by kind."""
    written = {"json": str(bench_report.write_json(result, bench))}
    if any("median" in row for row in result["rows"]):
        chart = Path(bench.output) / "bench.png"
        draw_chart(result["rows"], chart, _title(bench, result["machine"]))
        written["png"] = str(chart)
    return written


def _title(bench: BenchSettings, machine: dict[str, Any]) -> str:
    height, width = bench.size
    pictures = f"{bench.samples:,} pictures of 3 x {height} x {width} uint8"
    order = "shuffled" if bench.shuffle else "in order"
    return (
        f"{pictures}, batch {bench.batch_size}, {order}, {bench.workers} workers, warm cache\n"
        f"{machine['cpu']}, {machine['cores']} cores"
    )
