"""Cubes in the store.

Every inner chunk in one split, the same through any reader, where it belongs on Earth, and
restartable.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rioxarray  # noqa: F401
import xarray as xr
from cube_fakes import (
    DATES,
    EPSG,
    ORIGIN,
    SERIES,
    build_cube,
    expected_series,
    job_of,
    write_series,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.rasters.label_blocks import block_labels, default_block, default_shard
from ingest.synthetic.make import make_sample
from ingest.synthetic.settings import SampleSettings
from utils.config.yaml_file import read_yaml
from utils.loader import ChunkLoader
from warehouse import Warehouse
from warehouse.errors import CorruptError, StoreError
from warehouse.inspect.report import manifest_tables, write_contact_sheet
from warehouse.inspect.summary import export
from warehouse.inspect.verify import verify
from warehouse.layouts.cube.feature_stats import block_facts, merge_features
from warehouse.layouts.cube.geometry import LEFT_OUT, CubeChunking, CubeSampleIndex
from warehouse.layouts.features import Feature
from warehouse.settings import InspectSettings
from warehouse.write import bake as builder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def cube(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """7 dates, 50 x 70 pixels.

    3 x 7 x 9 inner chunks, ragged along every axis, in 2 x 3 x 3 stored chunks.
    """
    return build_cube(source, tmp_path_factory.mktemp("cube"))


def padded_truth() -> np.ndarray:
    """What `data` holds, in whole inner chunks: [9, 56, 72, 6]."""
    truth = expected_series()
    return np.pad(truth, ((0, 2), (0, 6), (0, 2), (0, 0)), constant_values=np.nan)


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "trace.jsonl")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


boxes = st.tuples(*[st.integers(1, 4)] * 3)


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    boxes,
    boxes,
    st.tuples(*[st.integers(1, 3)] * 3),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_every_inner_chunk_is_one_sample_of_one_split(
    inner_grid: Any, shard: Any, block: Any, inner: Any, seed: int
) -> None:
    def times(parts: tuple[int, ...]) -> tuple[int, int, int]:
        return parts[0] * inner[0], parts[1] * inner[1], parts[2] * inner[2]

    layout = CubeChunking((*times(inner_grid), 2), inner, times(shard), times(block))
    labels = np.random.default_rng(seed).integers(0, 4, layout.block_grid).astype(np.uint8)
    seen: list[tuple[int, ...]] = []
    for label in range(3):
        places = CubeSampleIndex(layout, labels, label)
        index = np.arange(len(places))
        chunks, slots = places.locate(index)
        assert sum(places.chunk_sizes) == len(places)
        assert np.array_equal(
            np.repeat(np.arange(len(places.chunk_sizes)), places.chunk_sizes), chunks
        )
        stored = np.array([places.stored(chunk) for chunk in chunks.tolist()], dtype=int)
        assert np.array_equal(np.lexsort((slots, stored)), index), (
            "numbered by (stored chunk, inner chunk)"
        )
        for (t, y, x), chunk, slot in zip(
            places.origins(index).tolist(), stored.tolist(), slots.tolist(), strict=True
        ):
            at = (t // inner[0], y // inner[1], x // inner[2])
            assert labels[tuple(a // b for a, b in zip(at, block, strict=True))] == label
            in_shard = np.ravel_multi_index(
                [a // b for a, b in zip(at, shard, strict=True)], layout.shard_grid
            )
            assert (chunk, slot) == (
                in_shard,
                np.ravel_multi_index([a % b for a, b in zip(at, shard, strict=True)], shard),
            )
            seen.append(at)
    left = np.argwhere(layout.inner_labels(labels) == LEFT_OUT).tolist()
    assert sorted(seen + [tuple(at) for at in left]) == list(np.ndindex(*inner_grid))


def test_data_and_valid_are_what_the_files_hold(cube: Warehouse) -> None:
    data, truth = cube.split("train").array("data")[:], expected_series()
    assert data.shape == (7, 56, 72, 6)
    assert np.allclose(data[:, :50, :70], truth, rtol=1e-6, equal_nan=True)
    assert np.isnan(data[:, 50:]).all()
    assert np.isnan(data[:, :, 70:]).all()
    assert np.array_equal(cube.split("train").array("valid")[:], ~np.isnan(data))


def test_a_hole_in_one_band_leaves_the_other_and_the_static_layer_alone(cube: Warehouse) -> None:
    valid = cube.split("train").array("valid")[:7, :50, :70]
    assert (valid[..., 0] & ~valid[..., 1]).any()
    assert valid[..., 5].all()
    assert not (valid[..., 2] & ~(valid[..., 0] & valid[..., 1])).any()


@pytest.mark.filterwarnings("ignore:batch_size")
@pytest.mark.parametrize(
    ("engine", "store"),
    [
        ("inline", "mmap"),
        ("thread", "pread"),
        ("thread", "memory"),
        ("thread", "stream"),
        ("inline", "library"),
    ],
)
def test_every_reader_gives_the_samples_at_their_origins(
    cube: Warehouse, engine: Any, store: Any
) -> None:
    truth = padded_truth()
    for name in cube.splits:
        split = cube.split(name)
        with ChunkLoader(split, 4, engine=engine, store=store, shuffle=True) as loader:
            seen = []
            for batch in loader:
                index = batch["index"].numpy()
                seen += index.tolist()
                for row, (t, y, x) in enumerate(split.origins(index).tolist()):
                    want = truth[t : t + 3, y : y + 8, x : x + 8]
                    assert np.allclose(batch["data"][row].numpy(), want, rtol=1e-6, equal_nan=True)
                    assert np.array_equal(batch["valid"][row].numpy(), ~np.isnan(want))
            assert loader.stats.decoded == len(split)
        assert sorted(seen) == list(range(len(split)))


@pytest.mark.filterwarnings("ignore:batch_size")
def test_spawned_workers_read_cubes_too(cube: Warehouse) -> None:
    split = cube.split("val")
    with (
        ChunkLoader(split, 4, engine="inline", store="mmap", seed=1) as one,
        ChunkLoader(split, 4, engine="spawn", store="stream", seed=1) as two,
    ):
        for left, right in zip(one, two, strict=True):
            assert np.array_equal(left["data"].numpy(), right["data"].numpy(), equal_nan=True)
            assert np.array_equal(left["index"].numpy(), right["index"].numpy())


def test_a_split_says_what_a_trainer_must_know(cube: Warehouse) -> None:
    train = cube.split("train")
    assert (train.arrays, train.class_names, train.max_boxes) == (["data", "valid"], [], None)
    assert train.specs["data"].shape == (len(train), 3, 8, 8, 6)
    assert [feature.name for feature in train.features] == [
        "red",
        "nir",
        "ndvi",
        "level",
        "cover",
        "class",
    ]
    truth, origins = padded_truth(), train.origins(np.arange(len(train)))
    shares = [
        np.mean(~np.isnan(truth[t : t + 3, y : y + 8, x : x + 8])) for t, y, x in origins.tolist()
    ]
    assert np.allclose(train.valid_share, shares)
    assert sum(len(cube.split(name)) for name in cube.splits) == 3 * 7 * 9
    assert cube.cube is not None
    assert [str(date)[:10].replace("-", "") for date in cube.cube.dates] == list(DATES)


def test_pictures_have_no_origins(small: Warehouse) -> None:
    assert small.split("train").features == ()
    with pytest.raises(StoreError, match="pictures"):
        small.split("train").origins(np.arange(2))


def test_statistics_are_over_valid_training_voxels(cube: Warehouse) -> None:
    truth, train = expected_series(), cube.split("train")
    inside = np.zeros((9, 56, 72), bool)
    for t, y, x in train.origins(np.arange(len(train))).tolist():
        inside[t : t + 3, y : y + 8, x : x + 8] = True
    values = truth[inside[:7, :50, :70]]
    for at, feature in enumerate(train.features):
        column = values[:, at][~np.isnan(values[:, at])].astype(np.float64)
        assert feature.valid_share == pytest.approx(len(column) / len(values))
        if feature.kind == "categorical":
            assert feature.mean is None
            assert feature.class_counts == tuple(
                int((column == code).sum()) for code in feature.codes
            )
        else:
            assert (feature.mean, feature.std) == pytest.approx(
                (column.mean(), column.std()), rel=1e-6
            )
            assert (feature.minimum, feature.maximum) == pytest.approx((column.min(), column.max()))


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), max_size=6), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_facts_of_parts_add_up_to_those_of_the_whole(parts: list[list[float]]) -> None:
    feature = Feature("a", "continuous")
    facts = []
    for part in parts:
        data = np.full((1, 1, 6, 1), np.nan, np.float32)
        data[0, 0, : len(part), 0] = part
        facts.append(block_facts(data, np.ones((1, 1, 6), bool), 0, [feature]))
    (merged,) = merge_features([feature], facts)
    whole = np.array([value for part in parts for value in part], np.float32).astype(np.float64)
    assert merged.valid_share == pytest.approx(len(whole) / (6 * len(parts)))
    if len(whole):
        assert merged.mean == pytest.approx(whole.mean(), rel=1e-9, abs=1e-9)
        assert merged.std == pytest.approx(whole.std(), rel=1e-6, abs=1e-6)
    else:
        assert merged.mean is None


def test_xarray_and_rioxarray_see_names_dates_and_the_right_place(cube: Warehouse) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xr.open_zarr(cube.store, group="cube", decode_coords="all")
        tree_view = xr.open_datatree(str(cube.store))
    assert opened.data.dims == ("time", "y", "x", "feature")
    assert opened.feature.values.tolist() == ["red", "nir", "ndvi", "level", "cover", "class"]
    assert [str(date)[:10].replace("-", "") for date in opened.time.values] == list(DATES)
    assert opened.data.rio.crs.to_epsg() == EPSG
    assert opened.data.rio.bounds() == pytest.approx(
        (ORIGIN[0], ORIGIN[1] - 560, ORIGIN[0] + 720, ORIGIN[1])
    )
    assert opened.attrs["spatial:bbox"] == pytest.approx(
        [ORIGIN[0], ORIGIN[1] - 560, ORIGIN[0] + 720, ORIGIN[1]]
    )
    assert opened.attrs["proj:code"] == f"EPSG:{EPSG}"
    place = opened.data.sel(feature="red").isel(time=2).sel(x=ORIGIN[0] + 405, y=ORIGIN[1] - 305)
    assert float(place) == expected_series()[2, 30, 40, 0]
    assert np.array_equal(opened.valid.values, ~np.isnan(opened.data.values))
    assert set(tree_view.children) == {"cube"}
    assert cube.split("train").xarray().data.chunks[0] == (6, 1)


def test_the_digest_is_of_the_content_whatever_the_stored_chunks(
    cube: Warehouse, source: Path, tmp_path: Path
) -> None:
    other = build_cube(
        source, tmp_path, SERIES | {"shard": {"time": 3, "y": 56, "x": 8}}, compressor="none"
    )
    assert other.version != cube.version
    assert other.manifest.digest == cube.manifest.digest


def test_a_row_of_samples_parquet_is_an_inner_chunk(cube: Warehouse) -> None:
    rows = pq.read_table(cube.folder / "samples.parquet").to_pylist()
    truth = cube.split("train").array("data")[:]
    padded = np.pad(truth, ((0, 2), (0, 0), (0, 0), (0, 0)), constant_values=np.nan)
    assert len(rows) == 189
    for row in rows[::20]:
        data = np.ascontiguousarray(
            padded[row["t"] : row["t"] + 3, row["y"] : row["y"] + 8, row["x"] : row["x"] + 8]
        )
        valid = np.ascontiguousarray(~np.isnan(data))
        assert row["sha256"] == hashlib.sha256(data.tobytes() + valid.tobytes()).hexdigest()
        assert cube.split(row["split"]).origins(np.array([row["index"]])).tolist() == [
            [row["t"], row["y"], row["x"]]
        ]


def test_two_roots_and_any_workers_give_the_same_bytes(
    cube: Warehouse, source: Path, tmp_path: Path
) -> None:
    local = build_cube(source, tmp_path, workers=2)
    assert local.version == cube.version
    assert tree(local.folder) == tree(cube.folder)


class StopAt(Exception):
    pass


def test_an_interrupted_build_goes_on_chunk_by_chunk(
    cube: Warehouse, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, baked = builder.bake_chunk, []

    def stopping(task: Any, **kw: Any) -> Any:
        if len(baked) == 7:
            raise StopAt
        baked.append(task.marker)
        return real(task, **kw)

    monkeypatch.setattr(builder, "bake_chunk", stopping)
    with pytest.raises(StopAt):
        build_cube(source, tmp_path)
    assert not (tmp_path / "CURRENT").exists()
    again: list[str] = []
    monkeypatch.setattr(
        builder, "bake_chunk", lambda task, **kw: again.append(task.marker) or real(task, **kw)
    )
    resumed = build_cube(source, tmp_path)
    assert len(again) == 18 - 7
    assert tree(resumed.folder) == tree(cube.folder)


def test_a_flipped_bit_reaches_nobody(source: Path, tmp_path: Path) -> None:
    warehouse = build_cube(source, tmp_path)
    assert verify(warehouse)[1] == []
    path = next(
        path
        for path in sorted((warehouse.folder / "warehouse.zarr/cube/data/c").rglob("*"))
        if path.is_file()
    )
    raw = bytearray(path.read_bytes())
    raw[100] ^= 4
    path.write_bytes(bytes(raw))
    faults = verify(warehouse)[1]
    assert [Path(fault.path).name for fault in faults] == [path.name]
    split = warehouse.split("train")
    with (
        pytest.raises(CorruptError, match="cube/data/c/0/0/0/0"),
        ChunkLoader(split, 4, engine="inline", store="mmap") as loader,
    ):
        list(loader)


@pytest.mark.parametrize("name", ["split", "valid_share"])
def test_damaged_labels_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    warehouse = build_cube(source, tmp_path)
    path = warehouse.folder / f"warehouse.zarr/cube/{name}/c/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[-6] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(CorruptError, match=name):
        _ = Warehouse.open(tmp_path).split("train").valid_share


def test_inspect_and_export_know_cubes(cube: Warehouse, tmp_path: Path) -> None:
    from PIL import Image

    sheet = write_contact_sheet(cube, InspectSettings(output=str(tmp_path / "sheet.png")))
    with Image.open(sheet) as picture:
        assert picture.width > 400
    assert [table.title.split()[0] for table in manifest_tables(cube)] == [
        "version",
        "features,",
        "splits",
    ]
    assert export(cube, tmp_path)["summary.parquet"] == 6
    assert pq.read_table(tmp_path / "summary.parquet")["name"].to_pylist()[0] == "red"


def test_default_blocks_are_the_largest_that_give_twenty() -> None:
    assert default_block((2, 23, 30)) == (2, 7, 7)
    assert default_block((14, 4, 4)) == (14, 1, 1)


def test_default_stored_chunks_are_small_enough_and_enough() -> None:
    for grid, size in (
        ((2, 23, 30), 143_360),
        ((1, 400, 400), 143_360),
        ((300, 4, 4), 10),
        ((1, 1, 3), 10),
    ):
        shard = default_shard(grid, size)
        stored = np.prod([-(-count // part) for count, part in zip(grid, shard, strict=True)])
        assert np.prod(shard) * size <= 128 << 20
        assert stored >= min(8, np.prod(grid))


def test_a_guard_ring_parts_training_from_what_is_held_out() -> None:
    shares = {"train": 0.6, "val": 0.2, "test": 0.2}
    plain, _ = block_labels((2, 20, 20), (2, 4, 4), shares, 5)
    labels, block = block_labels((2, 20, 20), (2, 4, 4), shares, 5, guard=1)
    assert block == (2, 1, 1)
    whole = plain[0].repeat(4, 0).repeat(4, 1)
    for y, x in np.ndindex(20, 20):
        near = whole[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        assert labels[0, y, x] == (LEFT_OUT if near.max() > whole[y, x] else whole[y, x])


def test_the_last_dates_can_be_held_out() -> None:
    labels, block = block_labels(
        (4, 8, 8), (4, 2, 2), {"train": 0.8, "val": 0.1, "test": 0.1}, 0, held_out=1
    )
    assert block == (1, 2, 2)
    assert (labels[-1] == 2).all()
    assert {0, 1, 2} == set(labels[0].ravel().tolist())
    assert np.array_equal(labels[0], labels[2])


def test_a_version_is_known_before_a_raster_is_opened(source: Path, tmp_path: Path) -> None:
    one, two = job_of(source, SERIES), job_of(source, SERIES | {"guard": 1})
    assert one.recipe != two.recipe
    assert job_of(source, SERIES | {"empty_dates": "keep"}).recipe == one.recipe
    assert json.dumps(one.recipe)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


def test_a_made_landscape_survives_kill_9_and_goes_through_every_command(tmp_path: Path) -> None:
    """Killed once a marker is there, built again, verified: the commands as a user types them."""
    root = Path(__file__).parents[2]
    sample, store = tmp_path / "sample", tmp_path / "store"
    make_sample(SampleSettings(kind="cube", count=7, size=(96, 128), output=str(sample)))
    build = command(
        "scripts.build_zarr",
        "--config",
        str(sample / "raster.yaml"),
        "--build.output_root",
        str(store),
        "--build.workers",
        "0",
    )
    killed = subprocess.Popen(build, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not any(store.glob(".staging-*/done/*.json")):
        pass
    killed.kill()
    killed.wait()
    done = subprocess.run(build, cwd=root, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert sum(result["splits"].values()) == 2 * 3 * 4
    assert "train_vqvae" in done.stderr
    warehouse = Warehouse.open(store)
    assert verify(warehouse)[1] == []
    features = {feature.name: feature for feature in warehouse.split("train").features}
    assert 0 < features["nir"].valid_share < features["height"].valid_share == 1
    assert features["height"].static
    again = build_cube(
        sample, tmp_path / "whole", read_yaml(sample / "raster.yaml", ["build", "raster"])["raster"]
    )
    assert tree(again.folder) == tree(warehouse.folder)
