"""The programs in `examples/` run as their first docstring line says, on a small version."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from warehouse import Warehouse

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PROJECT = {"detector", "features", "ingest", "segmentation", "utils", "vqvae", "warehouse"}


def run(name: str, *arguments: object, cwd: Path) -> list[str]:
    """The lines that `python -m examples.<name>` prints in the folder `cwd`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{name}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def root(small: Warehouse) -> Path:
    return small.folder.parent


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_begins_with_its_command(path: Path) -> None:
    source = path.read_text()
    first = (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]
    assert first.startswith(f"python -m examples.{path.stem}")
    assert len(source.splitlines()) <= 60


def test_the_table_of_examples_names_each_of_them() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    assert set(re.findall(r"`(\w+\.py)`", table)) == {path.name for path in EXAMPLES}


def test_a_training_loop_resumes_within_an_epoch(root: Path, tmp_path: Path) -> None:
    lines = run("training_loop", root, cwd=tmp_path)
    # 29 samples in chunks of 8, 8, 8 and 5 are 8 batches of at most 4; the first 4 came before.
    assert [line.split(",")[0] for line in lines] == ["epoch 0: 4 batches", "epoch 1: 8 batches"]


def test_an_augmentation_of_ones_own_differs_by_epoch_alone(root: Path, tmp_path: Path) -> None:
    once = run("own_augmentation", root, cwd=tmp_path)
    again = run("own_augmentation", root, cwd=tmp_path)
    assert once == again
    means = [line.rsplit(" ", 1)[1] for line in once]
    assert len(means) == 2
    assert means[0] != means[1]


def test_mirrored_boxes_cover_the_mirrored_pixels(small: Warehouse) -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from examples.own_augmentation import mirror_and_brighten
    finally:
        sys.path.remove(str(ROOT))
    import torch

    split = small.split("train")
    names = ("image", "box", "box_mask")
    batch = {name: torch.from_numpy(split.array(name)[:]) for name in names}
    batch["index"] = torch.arange(len(split))
    before = {name: tensor.clone() for name, tensor in batch.items()}
    after = mirror_and_brighten(batch, seed=3, epoch=1)

    assert all(torch.equal(batch[name], before[name]) for name in batch), (
        "inputs are not written to"
    )
    changed = (after["box"] != before["box"]).any(dim=-1)
    assert changed.any()
    assert not changed[~before["box_mask"]].any(), "unused slots stay zeros"
    # Twice the same mirror is none, and the height of a box stays what it is.
    twice = mirror_and_brighten({**before, "box": after["box"]}, seed=3, epoch=1)
    assert torch.allclose(twice["box"], before["box"], atol=1e-6)
    height = after["box"][..., 3] - after["box"][..., 1]
    assert torch.allclose(height, before["box"][..., 3] - before["box"][..., 1], atol=1e-6)


def test_xarray_alone_inspects_a_version(root: Path, tmp_path: Path) -> None:
    lines = run("inspect_with_xarray", root, "train", "one.png", cwd=tmp_path)
    assert any(line.startswith("box: float32 ('sample', 'slot', 'corner')") for line in lines)
    assert lines[-1] == "wrote one.png"
    with Image.open(tmp_path / "one.png") as image:
        assert np.ptp(np.asarray(image.convert("L"))) > 0


def test_xarray_alone_needs_none_of_this_project() -> None:
    code = "import sys, examples.inspect_with_xarray; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not (PROJECT | {"torch"}) & set(done.stdout.split())


def test_cached_tensors_are_computed_once_also_over_runs(root: Path, tmp_path: Path) -> None:
    first, second = run("cached_tensors", root, tmp_path / "cache", cwd=tmp_path)
    assert "0 hits, 9 misses" in first
    assert "9 hits, 9 misses" in second
    third, _ = run("cached_tensors", root, tmp_path / "cache", cwd=tmp_path)
    assert "9 hits, 0 misses" in third
    assert re.findall(r"mean (\S+),", first) == re.findall(r"mean (\S+),", third)


def test_text_items_are_drawn_and_read(tmp_path: Path) -> None:
    lines = run("text_items", cwd=tmp_path)
    assert [line.split(":")[0] for line in lines] == ["0.png", "1.png", "2.png", "3.png"]
    assert ["1 ignored" in line for line in lines] == [False, False, False, True]
    assert all("map (48, 80)" in line for line in lines)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
