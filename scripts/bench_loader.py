"""python -m scripts.bench_loader --config config.yaml [--bench.pictures FOLDER --bench.repeats 5]

Measures the loader, the machine's limits and other readers on the same decoded pixels: interleaved
rounds, each run in a fresh process, medians with min and max. Writes bench.json and bench.png.
Peers that are not installed are listed with the reason.
"""

from pathlib import Path
from typing import Any

from benchmarks.settings import BenchSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log

log = get_log("bench_loader")


class Settings(CommandSettings):
    bench: BenchSettings


def main(settings: Settings) -> dict[str, Any]:
    from benchmarks import report
    from benchmarks.catalogue import catalogue
    from benchmarks.data import Work
    from benchmarks.measure import measure_builds, measure_rows
    from benchmarks.scale import measure_scale
    from benchmarks.shuffle import measure_shuffle

    bench, machine = settings.bench, report.machine()
    log.info(
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}; "
        + ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    )
    work, rows = Work(bench), catalogue(bench)
    work.prepare(
        {row.data for row in rows} | ({"quality"} if "shuffle" in bench.parts else set()), log
    )
    timed: list[dict[str, Any]] = []
    builds: list[dict[str, Any]] = []
    absent: list[dict[str, str]] = []
    if {"loaders", "cold"} & set(bench.parts):
        timed, absent = measure_rows(work, rows, log)
    if "build" in bench.parts:
        builds, more = measure_builds(work, log)
        absent += more
    result = {
        "rows": timed,
        "limits": {
            row["name"]: row["median"]
            for row in timed
            if row["group"] == "limit" and "median" in row
        },
        "absent": absent,
        "ratios": report.ratios(timed, builds, bench.workers),
        "builds": builds,
        "shuffle": measure_shuffle(work, log) if "shuffle" in bench.parts else [],
        "scale": measure_scale(work.root / ".scale", log) if "scale" in bench.parts else None,
        "machine": machine,
        "settings": bench.model_dump(mode="json"),
    }
    for line in report.lines(result):
        log.info(line)
    return result | publish(result, bench, machine)


def publish(result: dict[str, Any], bench: Any, machine: dict[str, Any]) -> dict[str, str]:
    """Write bench.json and, where rows were timed, bench.png."""
    from benchmarks.chart import draw_chart
    from benchmarks.report import write_json

    written = {"json": str(write_json(result, bench))}
    if any("median" in row for row in result["rows"]):
        chart = Path(bench.output) / "bench.png"
        height, width = bench.size
        what = (
            f"{bench.samples:,} pictures of 3 x {height} x {width} uint8, batch {bench.batch_size}"
        )
        how = f"{'shuffled' if bench.shuffle else 'in order'}, {bench.workers} workers, warm cache"
        draw_chart(
            result["rows"], chart, f"{what}, {how}\n{machine['cpu']}, {machine['cores']} cores"
        )
        written["png"] = str(chart)
    log.info("written: " + ", ".join(written.values()))
    return written


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
