"""segment_patches killed, stopped, run in portions and by two at once.

It ends in the same bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from segment_fakes import Outcome, call, digest, files, flags, queue_rows, results

from segmentation import mask_jobs, mask_results
from segmentation.task import SegmentTask
from utils.training.checkpoint import load_checkpoint
from warehouse import Warehouse
from warehouse.format import durable

pytest_plugins = ["segment_fixtures"]


def die(argv: list[str], where: str, number: int, threads: int) -> None:
    """The command, killed as by `kill -9` within training step or prediction job `number` of this
    process.
    """
    # Sums depend on how many threads share them, and what other tests left in the environment
    # decides over a new process's.
    torch.set_num_threads(threads)
    kind, name = (
        (SegmentTask, "loss") if where == "train" else (mask_jobs.ProbabilityLoader, "__call__")
    )
    real, calls = getattr(kind, name), iter(range(10_000))

    def fatal(self: Any, *args: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    setattr(kind, name, fatal)
    call(*argv)


def test_killed_twice_in_training_and_twice_in_jobs_it_ends_in_the_same_bytes(
    pictures: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    # Imports are made once, in a process that has no threads; each run begins from there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "scripts.segment_patches",
            "segmentation.task",
            "segmentation.mask_jobs",
            "segmentation.mask_results",
            "ingest.pictures.large.patch_cutter",
            "utils.loader",
            "rasterio",
        ]
    )
    for where, number in (("train", 17), ("train", 8), ("predict", 2), ("predict", 1)):
        process = context.Process(
            target=die, args=(flags(pictures, output), where, number, torch.get_num_threads())
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not list(output.glob("v*-ramp"))
    assert call(*flags(pictures, output)) == 0
    # Twice a job was killed; the second process did one job more before it was.
    assert sorted(row["attempts"] for row in queue_rows(output))[-2:] == [2, 2]
    assert sum(row["attempts"] - 1 for row in queue_rows(output)) == 2
    whole, again = (
        load_checkpoint(folder / "checkpoint").part("average") for folder in (finished, output)
    )
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert digest(output) == digest(finished)
    for part in ("masks", "stitched", "sheets"):
        assert files(results(output) / part) == files(results(finished) / part)


def test_a_few_jobs_at_a_time_end_in_the_same_version(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    checkpoint = finished / "checkpoint"
    left = []
    for _ in range(20):
        code, result, _ = segment(pictures, tmp_path / "out", checkpoint=checkpoint, jobs=3)
        assert code == 0
        assert result is not None
        left.append(result["jobs_left"])
        if not left[-1]:
            break
        assert result["dice"] is None
        assert result["masks"] == 0
    assert left == [*range(len(queue_rows(finished)) - 3, 0, -3), 0]
    assert digest(tmp_path / "out") == digest(finished)
    assert not (tmp_path / "out" / "checkpoint").exists(), "a given checkpoint is not trained on"


def test_stitching_that_was_stopped_goes_on_with_the_next_picture(
    pictures: Path,
    finished: Path,
    tmp_path: Path,
    segment: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(results(tmp_path / "out"))
    real, done = mask_results.stitch, []

    def stopped(*args: Any, **more: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return real(*args, **more)

    monkeypatch.setattr(mask_results, "stitch", stopped)
    code, result, last = segment(pictures, tmp_path / "out")
    assert (code, result) == (130, None)
    assert last == "interrupted; run the same command again to resume it"
    first = list(done)
    monkeypatch.setattr(
        mask_results,
        "stitch",
        lambda *args, **more: done.append(args[1].name) or real(*args, **more),
    )
    assert segment(pictures, tmp_path / "out")[0] == 0
    assert len(done) == len(set(done)) == 7
    assert done[:3] == first
    assert files(results(tmp_path / "out") / "masks") == files(results(finished) / "masks")


def test_of_two_commands_that_stitch_at_once_each_picture_is_stitched_by_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, begun, real = tmp_path / "out", [], mask_results.stitch
    shutil.copytree(finished, output)
    shutil.rmtree(results(output))
    (probabilities,) = (output / "probabilities").glob("v*")
    asked, both, lock = set(), threading.Event(), durable.lock

    def noted(*args: Any, **more: Any) -> Any:
        asked.add(threading.get_ident())
        if len(asked) == 2:
            both.set()
        return lock(*args, **more)

    def held(cuts: Any, target: Path, **more: Any) -> Path:
        begun.append(target.name)
        assert both.wait(30), "the other command comes while this one stitches"
        return real(cuts, target, **more)

    def one(_: int) -> Any:
        patches = Warehouse.open(output / "patches")
        return mask_results.stitch_pictures(
            patches, probabilities, output, blend="ramp", tolerance=2
        ).scores

    monkeypatch.setattr(mask_results, "stitch", held)
    monkeypatch.setattr(durable, "lock", noted)
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(one, range(2)))
    assert len(begun) == len(set(begun)) == 7
    assert scores[0] == scores[1]
    assert files(results(output) / "stitched") == files(results(finished) / "stitched")
    assert sorted(path.name for path in results(output).iterdir()) == [
        "index.html",
        "masks",
        "scores.json",
        "sheets",
        "stitched",
    ]


def test_probabilities_may_be_deleted_and_are_predicted_anew_only_where_a_picture_is_not_stitched(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "probabilities")
    shutil.rmtree(results(output) / "masks")
    code, result, _ = segment(pictures, output)
    assert code == 0
    assert result is not None
    assert result["scores"] == json.loads((results(finished) / "scores.json").read_text())["scores"]
    assert files(results(output)) == files(results(finished))
    assert not list((output / "probabilities").glob("v*"))
    assert {row["attempts"] for row in queue_rows(output)} == {1}
    shutil.rmtree(results(output) / "stitched" / "images_free.zarr")
    code, result, _ = segment(pictures, output)
    assert code == 0
    assert result is not None
    assert (result["masks"], result["jobs_left"]) == (7, 0)
    assert digest(output) == digest(finished)
    assert files(results(output)) == files(results(finished))
