"""Versions that release 0.1 published still open, verify and train.

tests/data/README.md says how they were made.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from utils.loader import ChunkLoader
from warehouse import Warehouse

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "tests" / "data" / "version_0_1.tar.gz"

# warehouse: version, samples of each split, arrays
PUBLISHED: dict[str, tuple[str, dict[str, int], set[str]]] = {
    "pictures": (
        "vba6d57b45db1",
        {"train": 12, "val": 4},
        {"image", "box", "box_mask", "box_flags", "label", "letterbox"},
    ),
    "cube": ("vc698dfd2077e", {"train": 16, "val": 8, "test": 8}, {"data", "valid"}),
    "features": ("v316fd3b7a2bd", {"train": 12, "val": 4}, {"feature", "target"}),
    "codes": ("vc197db4fb160", {"train": 16, "val": 8, "test": 8}, {"codes", "valid", "origin"}),
}


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a warehouse for each layout, unpacked."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        # Refuses links, absolute paths and anything that would land outside the folder.
        archive.extractall(folder, filter="data")
    return folder / "version_0_1"


def command(name: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a script in a process of its own; its result."""
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_archive_is_small() -> None:
    assert ARCHIVE.stat().st_size < 200_000


@pytest.mark.parametrize("layout", PUBLISHED)
def test_it_opens_with_its_name_and_splits(earlier: Path, layout: str) -> None:
    version, samples, arrays = PUBLISHED[layout]
    warehouse = Warehouse.open(earlier / layout)
    assert warehouse.version == version
    assert {name: len(warehouse.split(name)) for name in warehouse.splits} == samples
    assert set(warehouse.manifest.arrays) == arrays


@pytest.mark.parametrize("layout", PUBLISHED)
def test_it_verifies(earlier: Path, layout: str) -> None:
    result = command("verify_zarr", "--verify.path", earlier / layout)
    assert result["ok"]
    assert result["bad"] == []
    assert result["files"] > 5


def test_the_xarray_view_of_pictures_opens(earlier: Path) -> None:
    _, samples, arrays = PUBLISHED["pictures"]
    warehouse = Warehouse.open(earlier / "pictures")
    for name, count in samples.items():
        view = warehouse.split(name).xarray().load()
        assert arrays <= set(view.data_vars)
        assert view["image"].shape == (count, 3, 32, 32)
        assert 0 <= float(view["image"].min()) < float(view["image"].max()) <= 1


def test_the_xarray_view_of_a_cube_opens(earlier: Path) -> None:
    view = Warehouse.open(earlier / "cube").split("train").xarray().load()
    assert dict(view["data"].sizes) == {"time": 4, "y": 32, "x": 32, "feature": 3}
    assert view["data"].sel(feature="cover").isin([1, 2, 5, 8]).all()


@pytest.mark.parametrize("layout", PUBLISHED)
@pytest.mark.parametrize("store", ["mmap", "memory", "library"])
def test_an_epoch_delivers_every_sample(earlier: Path, layout: str, store: str) -> None:
    _, samples, arrays = PUBLISHED[layout]
    warehouse = Warehouse.open(earlier / layout)
    for name, count in samples.items():
        split = warehouse.split(name)
        with ChunkLoader(split, batch_size=4, store=store, engine="inline") as loader:
            batches = [
                {key: value.numpy().copy() for key, value in batch.items()} for batch in loader
            ]
        assert arrays <= set(batches[0])
        indices = np.concatenate([batch["index"] for batch in batches])
        assert sorted(indices.tolist()) == list(range(count))


@pytest.mark.parametrize(
    ("layout", "array"), [("pictures", "box"), ("features", "feature"), ("codes", "codes")]
)
def test_the_loader_gives_what_xarray_reads_by_itself(
    earlier: Path, layout: str, array: str
) -> None:
    """Two readers that share no decoder: ours, and zarr-python's below xarray."""
    warehouse = Warehouse.open(earlier / layout)
    store = earlier / layout / warehouse.version / "warehouse.zarr"
    expected = xarray.open_zarr(store, group="train")[array].to_numpy()
    with ChunkLoader(warehouse.split("train"), batch_size=5, engine="inline", seed=3) as loader:
        for batch in loader:
            assert np.array_equal(batch[array].numpy(), expected[batch["index"].numpy()])


def test_the_pictures_train_a_detector(earlier: Path, tmp_path: Path) -> None:
    result = command(
        "train_detector",
        *("--detector.warehouse", earlier / "pictures"),
        *("--detector.output", tmp_path / "detector"),
        *("--detector.epochs", "1"),
        *("--detector.batch_size", "4"),
    )
    version, samples, _ = PUBLISHED["pictures"]
    assert (result["warehouse"], result["epochs"], result["steps"]) == (version, 1, 3)
    assert result["pictures"] == samples["val"]


def test_the_cube_trains_a_vqvae(earlier: Path, tmp_path: Path) -> None:
    result = command(
        "train_vqvae",
        *("--vqvae.warehouse", earlier / "cube"),
        *("--vqvae.output", tmp_path / "vqvae"),
        *("--vqvae.epochs", "1"),
        *("--vqvae.batch_size", "4"),
        *("--vqvae.width", "8"),
        *("--vqvae.depth", "1"),
        *("--vqvae.codebook_size", "16"),
        *("--vqvae.code_dim", "4"),
        *("--vqvae.levels", "2"),
        *("--vqvae.stride", "[1, 4, 4]"),
        *("--vqvae.patch", "[1, 4, 4]"),
    )
    assert (result["warehouse"], result["epochs"], result["steps"]) == (PUBLISHED["cube"][0], 1, 4)
    assert result["held_out"] == "val"


def test_the_features_train_heads(earlier: Path, tmp_path: Path) -> None:
    result = command(
        "train_head",
        *("--head.features", earlier / "features"),
        *("--head.output", tmp_path / "head"),
        *("--head.epochs", "1"),
    )
    assert result["features"] == PUBLISHED["features"][0]
    assert len(result["runs"]) == 3
