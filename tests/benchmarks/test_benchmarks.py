"""The benchmark's own arithmetic, its chart, and a tiny run.

What it says must be true before anybody quotes it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bench_report
from benchmarks.catalogue import catalogue
from benchmarks.chart import draw_chart, ordered
from benchmarks.data import Work, crc_sum
from benchmarks.limits import inner_chunks
from benchmarks.measure import evict, run_job, summarise, tree_memory
from benchmarks.scale import first_batch, write_version
from benchmarks.settings import PEERS, BenchSettings
from benchmarks.shuffle import (
    class_run,
    expected_class_run,
    expected_distance,
    neighbour_distance,
    quality,
)
from scripts import bench_loader
from scripts._command import run
from warehouse import Warehouse


def row(name: str, rates: list[float], group: str = "ours") -> dict[str, Any]:
    return {"name": name, "group": group, "workers": 2} | summarise(
        [{"rate": rate, "first_batch_s": None} for rate in rates]
    )


def test_neighbour_distance_of_a_full_shuffle_is_the_mean_over_all_permutations() -> None:
    orders = [np.array(order) for order in itertools.permutations(range(6))]
    assert np.mean([neighbour_distance(order) for order in orders]) == pytest.approx(
        expected_distance(6)
    )
    assert neighbour_distance(np.arange(6)) == 1


def test_class_runs_of_a_full_shuffle_follow_from_all_permutations() -> None:
    classes = np.array([0, 0, 0, 1, 1, 2])
    runs = [
        len(classes) / class_run(classes[list(order)]) for order in itertools.permutations(range(6))
    ]
    assert len(classes) / np.mean(runs) == pytest.approx(expected_class_run([3, 2, 1]))
    assert class_run(classes) == pytest.approx(2)
    assert expected_class_run([4]) == 4


def test_quality_is_one_for_a_full_shuffle_and_tells_clumped_orders() -> None:
    rng = np.random.default_rng(0)
    shuffled = quality([rng.permutation(5000) for _ in range(8)])
    assert shuffled["distance"] == pytest.approx(1, abs=0.02)
    assert shuffled["class_run"] == pytest.approx(1, abs=0.02)
    blocks = rng.permutation(50)[:, None] * 100 + rng.permuted(
        np.tile(np.arange(100), (50, 1)), axis=1
    )
    clumped = quality([blocks.reshape(-1)])
    assert clumped["distance"] < 0.1
    assert clumped["class_run"] > 10


def test_a_ratio_is_paired_by_round_so_that_a_slow_minute_hits_both() -> None:
    ours, limit = row("thread", [90, 45, 9]), row("lz4 decode", [100, 50, 10], "limit")
    assert bench_report.ratio(ours, limit) == pytest.approx(0.9)
    found = {entry["name"]: entry for entry in bench_report.ratios([ours, limit], [], 2)}
    assert found["thread / lz4 decode"]["met"]
    assert set(found) == {"thread / lz4 decode"}


def test_ratios_take_the_faster_of_a_peer_s_worker_counts_and_the_builds() -> None:
    rows = [
        row("thread", [100, 100]),
        row("LitData, 0 workers", [50, 50], "peer"),
        row("LitData, 2 workers", [20, 20], "peer"),
    ]
    builds = [
        {"name": name, "median": rate, "runs": [rate]}
        for name, rate in (("ours", 300.0), ("ffcv", 250.0))
    ]
    found = {entry["name"]: entry for entry in bench_report.ratios(rows, builds, 2)}
    assert found["thread / LitData, 0 workers"]["ratio"] == 2
    assert found["build / ffcv's writer"] == {
        "name": "build / ffcv's writer",
        "ratio": 1.2,
        "wanted": 1.3,
        "met": False,
    }


def test_the_chart_shows_timed_rows_only_and_is_a_png(tmp_path: Path) -> None:
    rows = [
        row("thread", [900, 950, 1000]),
        row("lz4 decode", [1000, 1010, 1020], "limit"),
        {"name": "cold only", "group": "peer"},
    ]
    assert [entry["name"] for entry in ordered(rows)] == ["thread", "lz4 decode"]
    draw_chart(rows, tmp_path / "deep" / "chart.png", "title")
    assert (tmp_path / "deep" / "chart.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no timed row"):
        draw_chart(rows[2:], tmp_path / "none.png", "title")


def test_the_checksum_ignores_order_but_not_a_pixel_nor_a_sample_given_twice() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8)).astype(np.uint8)
    assert crc_sum(batch) == crc_sum(batch[::-1])
    changed = batch.copy()
    changed[2, 0, 0, 0] ^= 1
    assert crc_sum(changed) != crc_sum(batch)
    assert crc_sum(batch[[0, 1, 2, 3, 3]]) != crc_sum(batch)


def test_every_peer_has_a_row_and_names_are_unique() -> None:
    rows = catalogue(BenchSettings())
    assert {entry.peer for entry in rows} - {None} == set(PEERS)
    assert len({entry.name for entry in rows}) == len(rows)
    assert all(entry.peer is None for entry in catalogue(BenchSettings(peers=())))
    assert {entry.peer for entry in catalogue(BenchSettings(peers=("ffcv",)))} == {None, "ffcv"}


def test_the_limit_parses_the_shards_apart_from_the_store_and_agrees_with_it(
    small: Warehouse,
) -> None:
    chunks, size = inner_chunks(small.store, "train/image")
    assert (len(chunks), size) == (29, 8)
    from warehouse.format.inner_chunks import decode_into

    split = small.split("train")
    expected = split.array("image")[:]
    for sample in (0, 7, 8, 28):
        out = np.empty(expected.shape[1:], np.uint8)
        decode_into(chunks[sample], out, split.specs["image"].codec, True)
        assert np.array_equal(out, expected[sample])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="posix_fadvise is not there")
def test_evicting_says_how_much_stayed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(1 << 20))
    left = evict([tmp_path / "file"])
    assert left is None or 0 <= left <= 1


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="the kernel gives no PSS here"
)
def test_memory_counts_what_a_process_holds() -> None:
    before = tree_memory(os.getpid())
    held = np.ones(64 << 20, np.uint8)
    after = tree_memory(os.getpid())
    assert before is not None
    assert after is not None
    assert after["private"] - before["private"] > 48
    assert held[0] == 1


def test_a_version_of_which_one_chunk_exists_gives_the_first_batch(tmp_path: Path) -> None:
    from benchmarks.scale import BATCH, RANK, WORLD_SIZE
    from utils.samplers import ChunkBatchSampler

    chunks, per_chunk = 1500, 2 * BATCH
    plans = ChunkBatchSampler(
        [per_chunk] * chunks, BATCH, rank=RANK, world_size=WORLD_SIZE
    ).batches(0)
    present = sorted({int(index) // per_chunk for _ in range(2) for index in next(plans).indices})
    write_version(tmp_path, chunks, per_chunk, present)
    said = first_batch(tmp_path, 1)
    assert said["seconds"] > 0
    assert math.isclose(
        said["seconds"], said["open_s"] + said["loader_s"] + said["batch_s"], rel_tol=1e-6
    )


TINY = {
    "samples": 24,
    "size": (16, 24),
    "batch_size": 4,
    "seconds": 0.0,
    "repeats": 1,
    "peers": ("jpeg",),
}


def test_a_tiny_run_measures_our_engine_and_lists_what_is_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "work": tmp_path / "work",
        "output": tmp_path / "out",
        "samples": 24,
        "size": "[16, 24]",
        "batch_size": 4,
        "seconds": 0,
        "repeats": 1,
        "parts": "[loaders, shuffle]",
        "peers": "[webdataset]",
        "rows": "[lz4 decode, inline, WebDataset]",
        "timeout": 120,
    }
    argv = [word for key, value in flags.items() for word in (f"--bench.{key}", str(value))]
    assert run(bench_loader.main, bench_loader.Settings, bench_loader.__doc__, argv) == 0
    result = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    rows = {entry["name"]: entry for entry in result["rows"]}
    assert {"lz4 decode", "inline"} <= set(rows)
    assert rows["inline"]["min"] <= rows["inline"]["median"] <= rows["inline"]["max"]
    assert rows["inline"]["decoded_per_sample"] == 1
    assert rows["inline"]["peak_pss_mb"] is None or rows["inline"]["peak_pss_mb"] > 0
    assert set(result["limits"]) == {"lz4 decode", "lz4 decode + crc32c"}
    # Installed or not, the peer is accounted for.
    shown = set(rows) | {entry["name"] for entry in result["absent"]}
    assert {"WebDataset, 0 workers", "WebDataset, 2 workers"} <= shown
    assert all(entry["reason"] for entry in result["absent"])
    assert {entry["permuted"] for entry in result["shuffle"]} == {True, False}
    assert json.loads(Path(result["json"]).read_text())["rows"] == result["rows"]
    assert Path(result["png"]).read_bytes().startswith(b"\x89PNG")
    settings = BenchSettings(work=str(tmp_path / "work"), **TINY)
    _a_row_that_delivers_other_pixels_is_refused(settings)


def _a_row_that_delivers_other_pixels_is_refused(settings: BenchSettings) -> None:
    truth = Work(settings).path("pixels") / "truth.json"
    truth.write_text(json.dumps({"samples": 24, "crc_sum": 1}))
    said = run_job(settings, {"mode": "check", "name": "inline"})
    assert "checksum" in said["absent"]
