"""The commands under torchrun, two real processes.

One result line, and codebooks that one process would have learnt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cube_fakes import build_cube, write_series
from safetensors.torch import load_file

from scripts.train_vqvae import Settings, main
from utils.argyaml import load_settings

ROOT = Path(__file__).parents[2]
FEW = (
    "--vqvae.width",
    "8",
    "--vqvae.depth",
    "1",
    "--vqvae.stride",
    "[3, 4, 4]",
    "--vqvae.patch",
    "[3, 4, 4]",
    "--vqvae.levels",
    "2",
    "--vqvae.codebook_size",
    "16",
    "--vqvae.start_step",
    "2",
    "--vqvae.epochs",
    "1",
    "--vqvae.batch_size",
    "4",
    "--vqvae.log_interval",
    "1",
    "--vqvae.precision",
    "float32",
    "--vqvae.device",
    "cpu",
    "--experiments.db",
    "null",
)


def words(store: Path, output: Path) -> list[str]:
    return ["--vqvae.warehouse", str(store), "--vqvae.output", str(output), *FEW]


def steps_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


def state_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / json.loads((output / "checkpoint.json").read_text())["file"])


def test_two_ranks_print_one_result_and_learn_the_codebooks_of_one_process(tmp_path: Path) -> None:
    store = tmp_path / "store"
    build_cube(write_series(tmp_path / "in"), store)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "scripts.train_vqvae",
    ]
    two = subprocess.run(
        [*torchrun, *words(store, tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    # The same batches: two ranks take every other one of the order, one process takes them two at a
    # time.
    one = main(
        load_settings(Settings, None, [*words(store, tmp_path / "one"), "--vqvae.accumulate", "2"])
    )
    assert len(two.stdout.splitlines()) == 1
    assert json.loads(two.stdout)["steps"] == one["steps"]
    assert two.stderr.count("next: python -m scripts.compress_zarr") == 1

    left, right = steps_of(tmp_path / "one"), steps_of(tmp_path / "two")
    assert [row["samples"] for row in left] == [row["samples"] for row in right]
    for name in ("total", "vq", "pplx", "usage", "pplx_2"):
        assert [row[name] for row in right] == pytest.approx(
            [row[name] for row in left], rel=1e-4, abs=1e-4
        ), name
    one_state, two_state = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    statistics = [name for name in one_state if "quantizer" in name]
    assert any("count" in name for name in statistics)
    for name in statistics:
        assert torch.allclose(
            one_state[name].double(), two_state[name].double(), rtol=1e-4, atol=1e-4
        ), name
