"""python -m benchmarks.feature_jobs WAREHOUSE [--work artifacts/feature_bench] : micro-jobs of
features, timed, killed and shared.

WAREHOUSE: pictures with classes, 64 of them to train on at least. Four measurements, all through
the commands and with random weights: one job of 64 pictures at 224; `kill -9` in each of ten jobs,
then run to the end, beside an uninterrupted run; two commands at once; a trained head scored on
cached features against encoding its pictures. One JSON line, exit 1 where a digest, a claim or a
figure is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from warehouse import Warehouse

__all__ = ["cached_evaluation", "killed", "one_job", "shared"]

JOBS = 10
ENCODER = "random:efficientnet_b0"


def command(script: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"scripts.{script}", *flags]


def extract(warehouse: str, folder: Path, *flags: str) -> list[str]:
    return command(
        "extract_features",
        "--features.warehouse",
        warehouse,
        "--features.encoder",
        ENCODER,
        "--features.output_root",
        str(folder / "features"),
        "--features.work",
        str(folder / "work"),
        *flags,
    )


def answer(argv: list[str]) -> dict[str, Any]:
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows(folder: Path) -> list[dict[str, Any]]:
    """The queue below `folder`, empty before there is one."""
    path = next((folder / "work").glob("*/jobs.db"), None) if folder.exists() else None
    if path is None:
        return []
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as queue:
        queue.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in queue.execute("SELECT * FROM jobs ORDER BY id")]
        except sqlite3.OperationalError:  # its table is just being made
            return []


def one_job(warehouse: str, folder: Path) -> dict[str, Any]:
    """Seconds of the first job, of the whole command, and the command's peak memory."""
    start = time.perf_counter()
    answer(extract(warehouse, folder, "--features.size", "224", "--features.jobs", "1"))
    done = next(row for row in rows(folder) if row["state"] == "done")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return {
        "pictures": done["samples"],
        "job_s": done["seconds"],
        "command_s": round(time.perf_counter() - start, 2),
        "peak_gb": round(peak, 3),
    }


def killed(warehouse: str, folder: Path, flags: list[str]) -> dict[str, Any]:
    """Each job is killed once while it runs, and then all are done."""
    for job in range(JOBS):
        process = subprocess.Popen(
            extract(warehouse, folder, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not any(
            row["state"] == "running" and row["pid"] == process.pid and row["id"] == job
            for row in rows(folder)
        ):
            if process.poll() is not None:
                raise SystemExit(f"the command ended before job {job} could be killed")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if job < JOBS - 1:
            answer(extract(warehouse, folder, *flags, "--features.jobs", "1"))
    end = answer(extract(warehouse, folder, *flags))
    return {"digest": end["digest"], "attempts": [row["attempts"] for row in rows(folder)]}


def shared(warehouse: str, folder: Path, flags: list[str]) -> dict[str, Any]:
    processes = [
        subprocess.Popen(
            extract(warehouse, folder, *flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    codes = [process.wait() for process in processes]
    found, end = rows(folder), answer(extract(warehouse, folder, *flags))
    by_process = [sum(row["pid"] == process.pid for row in found) for process in processes]
    return {
        "digest": end["digest"],
        "attempts": [row["attempts"] for row in found],
        "exit": codes,
        "by_process": by_process,
    }


def cached_evaluation(whole: Path, folder: Path) -> dict[str, Any]:
    """A head trained and then scored again on its cached held-out features, against encoding those
    pictures, as their jobs did; `same`: whether all figures agree."""
    flags = [
        "--head.features",
        str(whole / "features"),
        "--head.output",
        str(folder),
        "--experiments.db",
        "null",
    ]
    trained = answer(command("train_head", *flags, "--head.ablations", "[]"))["runs"][0]
    answered = answer(command("train_head", *flags, "--head.checkpoint", trained["path"]))
    scored = answered["runs"][0] if "runs" in answered else answered
    encoding = sum(row["seconds"] for row in rows(whole) if row["split"] == trained["held_out"])
    return {
        "encoding_s": round(encoding, 3),
        "cached_s": scored["seconds"],
        "ratio": round(encoding / scored["seconds"]),
        "same": all(
            scored[key] == trained[key] for key in ("accuracy", "macro_f1", "auroc", "ece")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("warehouse")
    parser.add_argument("--work", type=Path, default=Path("artifacts/feature_bench"))
    asked = parser.parse_args()
    work, source = asked.work / str(os.getpid()), Warehouse.open(asked.warehouse)
    samples = sum(len(source.split(name)) for name in source.splits)
    # A split's last job may be short, so that three splits give ten jobs for some size.
    size = next(
        each
        for each in range(1, samples)
        if sum(-(-len(source.split(name)) // each) for name in source.splits) == JOBS
    )
    flags = ["--features.size", "96", "--features.job_size", str(size)]
    report = {"one_job": one_job(asked.warehouse, work / "one")}
    whole = answer(extract(asked.warehouse, work / "whole", *flags))
    report |= {
        "killed": killed(asked.warehouse, work / "killed", flags),
        "shared": shared(asked.warehouse, work / "shared", flags),
    }
    report["evaluation"] = cached_evaluation(work / "whole", work / "head")
    right = [report[name]["digest"] == whole["digest"] for name in ("killed", "shared")]
    right += [
        report["killed"]["attempts"] == [2] * JOBS,
        report["shared"]["attempts"] == [1] * JOBS,
        report["evaluation"]["same"],
    ]
    print(json.dumps({"digest": whole["digest"], **report, "right": all(right)}))
    raise SystemExit(0 if all(right) else 1)


if __name__ == "__main__":
    main()
