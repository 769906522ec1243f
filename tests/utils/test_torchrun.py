"""The commands under torchrun, two real processes.

One result line, and codebooks that one process would have learnt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder with `store` and the run `two` of two ranks; their stdout and stderr."""
    folder = tmp_path_factory.mktemp("ranks")
    build_cube(write_series(folder / "in"), folder / "store")
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
        [*torchrun, *words(folder / "store", folder / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    return folder, two.stdout, two.stderr


@pytest.fixture(params=[1, 4])
def threads_left_by_other_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_left_by_other_tests", "one_torch_thread")
def test_two_ranks_print_one_result_and_learn_the_codebooks_of_one_process(
    two_ranks: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder, stdout, stderr = two_ranks
    # The same batches: two ranks take every other one of the order, one process takes them two at a
    # time.
    arguments = [*words(folder / "store", tmp_path / "one"), "--vqvae.accumulate", "2"]
    one = main(load_settings(Settings, None, arguments))
    assert len(stdout.splitlines()) == 1
    assert json.loads(stdout)["steps"] == one["steps"]
    assert stderr.count("next: python -m scripts.compress_zarr") == 1

    left, right = steps_of(tmp_path / "one"), steps_of(folder / "two")
    assert [row["samples"] for row in left] == [row["samples"] for row in right]
    for name in ("total", "vq", "pplx", "usage", "pplx_2"):
        assert [row[name] for row in right] == pytest.approx(
            [row[name] for row in left], rel=1e-4, abs=1e-4
        ), name
    one_state, two_state = state_of(tmp_path / "one"), state_of(folder / "two")
    statistics = [name for name in one_state if "quantizer" in name]
    assert any("count" in name for name in statistics)
    for name in statistics:
        assert torch.allclose(
            one_state[name].double(), two_state[name].double(), rtol=1e-4, atol=1e-4
        ), name
