"""The build.

One digest for any workers, restartable anywhere, loud and clean when it cannot go on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fakes import SMALL, Load, build, numbers, plan_of, sample

from warehouse import Warehouse
from warehouse.errors import BuildError, CorruptError, LockedError, SpaceError
from warehouse.format import durable
from warehouse.format.manifest import SplitInfo, read_manifest
from warehouse.format.schema import shard_samples
from warehouse.inspect.verify import verify
from warehouse.settings import BuildSettings
from warehouse.write import bake as builder
from warehouse.write.cluster import task_runner
from warehouse.write.publish import bake, open_root, published


def tree(folder: Path) -> dict[str, bytes]:
    timings = {"trace.jsonl"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in timings
    }


def test_two_roots_and_any_workers_give_the_same_bytes(tmp_path: Path) -> None:
    inline, local = build(tmp_path / "a"), build(tmp_path / "b", workers=2)
    assert inline.version == local.version
    assert tree(inline.folder) == tree(local.folder)


def test_the_root_holds_current_and_the_version_only(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CURRENT", warehouse.version]
    assert (tmp_path / "CURRENT").read_text().strip() == warehouse.version


def test_no_codec_and_no_chunking_changes_the_content_digest(tmp_path: Path) -> None:
    one = build(tmp_path / "a").manifest
    two = build(
        tmp_path / "b",
        settings=BuildSettings(**(SMALL.model_dump() | {"compressor": "none", "shard_samples": 3})),
    ).manifest
    assert one.version != two.version
    assert one.digest == two.digest


def test_the_content_digest_follows_from_the_samples_alone(tmp_path: Path) -> None:
    """An oracle of its own: sha256 over a sample's arrays in layout order."""
    import hashlib

    warehouse = build(tmp_path)
    rows = warehouse.table("samples.parquet").to_pylist()
    for row, number in zip(rows, numbers("train", 29) + numbers("val", 9), strict=True):
        arrays = sample(number)
        assert (
            row["sha256"]
            == hashlib.sha256(b"".join(arrays[name].tobytes() for name in arrays)).hexdigest()
        )


def test_a_picture_unreadable_while_baking_is_left_out_and_the_rest_kept(tmp_path: Path) -> None:
    warehouse = build(tmp_path, bad=(3, 17, 1002))
    assert {name: len(warehouse.split(name)) for name in warehouse.splits} == {
        "train": 27,
        "val": 8,
    }
    assert (warehouse.manifest.found, warehouse.manifest.kept, warehouse.manifest.rejected) == (
        38,
        35,
        3,
    )
    assert verify(warehouse)[1] == []


def test_a_build_with_failures_starts_over_for_touched_chunks_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    baked: list[str] = []
    real = builder.bake_chunk
    monkeypatch.setattr(
        builder, "bake_chunk", lambda task, **kw: baked.append(task.marker) or real(task, **kw)
    )
    build(tmp_path, {"train": 29}, bad=(28,))
    assert baked == [f"done/train-{n}.json" for n in (0, 1, 2, 3, 3)]


def test_chunks_of_other_boxes_or_labels_are_never_taken_over(tmp_path: Path) -> None:
    """What `load` depends on may change while the pictures stay.

    Class ids shift when a class loses its last picture.
    """
    plan = plan_of({"train": 8})
    other = replace(
        plan, splits=(replace(plan.splits[0], digests=tuple(f"other {n}" for n in range(8))),)
    )
    staging = tmp_path / "staging"
    builder.bake_chunks(plan, Load(), staging)
    baked: list[int] = []
    load = Load()
    builder.bake_chunks(other, lambda number: baked.append(number) or load(number), staging)  # type: ignore[func-returns-value]
    assert len(baked) == 8


class StopAt(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_an_interrupted_build_goes_on_chunk_by_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = build(tmp_path / "whole")
    real, baked = builder.bake_chunk, []

    def stopping(task: Any, **kw: Any) -> Any:
        if len(baked) == stop:
            raise StopAt
        baked.append(task.marker)
        return real(task, **kw)

    monkeypatch.setattr(builder, "bake_chunk", stopping)
    with pytest.raises(StopAt):
        build(tmp_path / "part")
    assert not (tmp_path / "part" / "CURRENT").exists()
    again: list[str] = []
    monkeypatch.setattr(
        builder, "bake_chunk", lambda task, **kw: again.append(task.marker) or real(task, **kw)
    )
    resumed = build(tmp_path / "part")
    assert len(again) == 6 - stop
    assert tree(resumed.folder) == tree(whole.folder)
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == [
        "CURRENT",
        resumed.version,
    ]


def test_a_damaged_marker_or_file_in_staging_is_baked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "whole")
    plan = plan_of({"train": 29, "val": 9})
    staging = tmp_path / "part" / f".staging-{plan.version}"
    builder.bake_chunks(plan, Load(), staging)
    (staging / "done/train-0.json").write_text("{")
    os.truncate(staging / "warehouse.zarr/train/image/c/1/0/0/0", 10)
    (staging / "warehouse.zarr/train/stray").write_text("x")
    assert tree(build(tmp_path / "part").folder) == tree(whole.folder)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import fakes

class Slow(fakes.Load):
    def __call__(self, number):
        time.sleep(0.004)
        return super().__call__(number)

fakes.Load = Slow
if __name__ == "__main__":
    print("go", flush=True)
    fakes.build(Path({root!r}), {{"train": 60, "val": 9}}, workers={workers})
    print("done", flush=True)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_many_moments_then_the_same_command_gives_the_same_bytes(
    tmp_path: Path, workers: int
) -> None:
    counts = {"train": 60, "val": 9}
    whole = build(tmp_path / "whole", counts)
    script = tmp_path / "killed.py"
    moments = [0.02, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4] if workers == 0 else [0.7, 1.1]
    for at, moment in enumerate(moments):
        root = tmp_path / f"root{at}"
        script.write_text(
            KILLED.format(
                tests=str(Path(__file__).parents[1] / "support"), root=str(root), workers=workers
            )
        )
        process = subprocess.Popen(
            [sys.executable, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        resumed = build(root, counts)
        assert tree(resumed.folder) == tree(whole.folder)
        assert sorted(path.name for path in root.iterdir()) == ["CURRENT", resumed.version]
        shutil.rmtree(root)


# A process inherits an ignored SIGINT, as under nohup or from a background job of a shell, and
# Python then does not answer it. What a terminal starts does not ignore it: that is tested here.
INTERRUPTIBLE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture
def _parent_ignores_sigint() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_parent_ignores_sigint")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_ctrl_c_leaves_staging_and_no_process(tmp_path: Path, signal_name: str) -> None:
    import psutil

    source, root = tmp_path / "pictures", tmp_path / "root"
    make = [
        sys.executable,
        "-m",
        "scripts.make_sample",
        "--sample.count",
        "400",
        "--sample.size",
        "[96, 96]",
        "--sample.output",
        str(source),
    ]
    subprocess.run(make, check=True, capture_output=True, timeout=120)
    command = [
        sys.executable,
        "-m",
        "scripts.build_zarr",
        "--build.input_root",
        str(source),
        "--build.output_root",
        str(root),
    ]
    command += [
        "--build.workers",
        "2",
        "--build.target_size",
        "[512, 512]",
        "--build.shard_samples",
        "16",
        "--build.max_boxes",
        "64",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while (
        not list(root.glob(".staging-*/done/*.json"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.monotonic()
    children = psutil.Process(process.pid).children(recursive=True)
    if signal_name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    else:
        process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.strip().splitlines()[-1] == "interrupted; run the same command again to resume it"
    assert "Traceback" not in stderr
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert [path.name[:9] for path in root.iterdir()] == [".staging-"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert len(list(root.iterdir())) == 2


def test_a_published_version_is_found_again_and_current_mended(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    (tmp_path / "CURRENT").unlink()
    (tmp_path / f".staging-{warehouse.version}").mkdir()
    manifest = published(tmp_path, warehouse.version)
    assert manifest == warehouse.manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CURRENT", warehouse.version]
    assert published(tmp_path, "v" + "0" * 12) is None


def test_a_second_version_moves_current_and_leaves_the_first_alone(tmp_path: Path) -> None:
    first = build(tmp_path)
    before = tree(first.folder)
    second = build(tmp_path, note="another recipe")
    assert first.version != second.version
    assert Warehouse.open(tmp_path).version == second.version
    assert tree(first.folder) == before


def test_building_over_a_damaged_version_heals_it(tmp_path: Path) -> None:
    """What `--build.if_exists clear` does: the version is baked anew and swapped in whole."""
    warehouse = build(tmp_path)
    before = tree(warehouse.folder)
    (warehouse.store / "train/image/c/0/0/0/0").write_bytes(b"")
    assert tree(build(tmp_path, clear=True).folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CURRENT", warehouse.version]


def test_a_second_builder_of_the_same_version_is_told_who_holds_it(tmp_path: Path) -> None:
    open_root(tmp_path)
    plan = plan_of({"train": 29, "val": 9})
    with (
        durable.lock(tmp_path / f".lock-{plan.version}"),
        pytest.raises(LockedError, match=f"process {os.getpid()}"),
    ):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unusable_output_root_is_a_typed_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BuildError, match="is a file"):
        open_root(file)
    with pytest.raises(BuildError, match="output_root"):
        open_root(file / "below")


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda _: 1000)
    with pytest.raises(SpaceError, match="about"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [2_000, 20_000])
def test_a_disk_that_fills_up_is_a_typed_error_and_a_later_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    import errno

    real, left = durable.DurableFile.write, [size]

    def write(self: durable.DurableFile, data: bytes) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    monkeypatch.setattr(durable.DurableFile, "write", write)
    with pytest.raises(SpaceError, match="run the same command again"):
        build(tmp_path)
    monkeypatch.setattr(durable.DurableFile, "write", real)
    assert not list(tmp_path.rglob("*.part"))
    assert verify(build(tmp_path))[1] == []


def test_a_version_whose_manifest_was_edited_is_not_taken_for_built(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    path = warehouse.folder / "manifest.json"
    path.write_text(path.read_text().replace('"found": 38', '"found": 39'))
    with pytest.raises(CorruptError, match="if_exists clear"):
        published(tmp_path, warehouse.version)


def test_nothing_in_the_manifest_and_tables_is_absolute_or_of_this_run(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    text = (warehouse.folder / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert all(
        not path.startswith("/")
        for path in pq.read_table(warehouse.folder / "files.parquet")["path"].to_pylist()
    )
    assert read_manifest(warehouse.folder).splits == {
        "train": SplitInfo(samples=29, shard_samples=8, chunks=4),
        "val": SplitInfo(samples=9, shard_samples=8, chunks=2),
    }


def test_the_trace_has_a_line_a_chunk(tmp_path: Path) -> None:
    lines = [
        json.loads(line)
        for line in (build(tmp_path).folder / "trace.jsonl").read_text().splitlines()
    ]
    assert [(line["split"], line["chunk"]) for line in lines] == [
        ("train", 0),
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("val", 0),
        ("val", 1),
    ]
    assert all({"read", "decode", "letterbox", "encode", "write"} <= set(line) for line in lines)


@pytest.mark.parametrize(
    ("samples", "sample_bytes", "size"),
    [
        (10, 442_368, 64),
        (218, 442_368, 64),
        (2048, 442_368, 256),
        (100_000, 442_368, 303),
        (1000, 1 << 27, 64),
        (4096, 1000, 512),
    ],
)
def test_the_stored_chunk_is_128_mib_at_most_an_eighth_at_least_64(
    samples: int, sample_bytes: int, size: int
) -> None:
    assert shard_samples(samples, sample_bytes) == size


def test_a_sample_of_the_wrong_shape_stops_the_build(tmp_path: Path) -> None:
    plan = plan_of({"train": 4})
    wrong = Load(BuildSettings(**(SMALL.model_dump() | {"target_size": (24, 16)})))
    open_root(tmp_path)
    with pytest.raises(BuildError, match="does not fit the layout"):
        bake(
            lambda _: plan,
            lambda _: wrong,
            tmp_path,
            workers=0,
            cluster=None,
            trace=False,
            on_plan=lambda _: None,
        )


def test_worker_processes_leave_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dask sets its workers' variables here. OMP_NUM_THREADS=1 would reach whatever is loaded or
    started after a build.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    before = dict(os.environ)
    with task_runner(1, None) as run_all:
        assert list(run_all(os.getenv, ["OMP_NUM_THREADS"])) == [("OMP_NUM_THREADS", "1")]
    assert dict(os.environ) == before


def test_what_tasks_need_is_imported_here_before_a_worker_starts() -> None:
    """A worker that starts while OpenCV is being imported inherits a sys.path on which `typing` is
    OpenCV's, and dies.
    """
    alive: list[int] = []
    with task_runner(
        1, None, lambda: alive.append(len(multiprocessing.active_children()))
    ) as run_all:
        assert alive == [0]
        assert list(run_all(abs, [-3])) == [(-3, 3)]
    assert not multiprocessing.active_children()
