"""Inner chunks of some features.

The same samples, splits and values as with all in one, and a band read without the others.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from cube_fakes import EPSG, SERIES, build_cube, job_of, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import Store
from zarr.storage import LocalStore, WrapperStore

from utils.loader import ChunkLoader
from warehouse import Warehouse
from warehouse.errors import CorruptError
from warehouse.inspect.report import manifest_tables
from warehouse.inspect.verify import verify


def grouped(size: int | None) -> dict[str, Any]:
    return SERIES | {"chunk": SERIES["chunk"] | {"feature": size}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    return build_cube(source, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def fours(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """Six features in groups of four: the second group is half full."""
    return build_cube(source, tmp_path_factory.mktemp("fours"), grouped(4))


def write_npy(root: Path, values: np.ndarray) -> dict[str, Any]:
    """values: [time, y, x, feature], a source of a cube on their own grid.

    The raster section of it, without chunks.
    """
    height, width, count = values.shape[1:]
    np.save(root / "a.npy", values)
    (root / "times.json").write_text(
        json.dumps([f"2020-01-{day + 1:02d}" for day in range(len(values))])
    )
    crs = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{EPSG}"}}
    corners = [[0, 0], [0, height], [width, height], [width, 0], [0, 0]]
    (root / "box.geojson").write_text(
        json.dumps({"type": "Polygon", "crs": crs, "coordinates": [corners]})
    )
    features = [{"name": f"f{at}", "files": "a.npy", "band": at + 1} for at in range(count)]
    return {
        "grid": {"geojson": "box.geojson"},
        "time": {"file": "times.json"},
        "features": features,
    }


@given(
    st.integers(1, 7),
    st.integers(1, 8),
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9)),
    st.sampled_from(["lz4", "lz4hc", "none"]),
    st.sampled_from(["mmap", "pread", "memory", "stream"]),
)
@settings(max_examples=25, deadline=None)
def test_any_group_size_stores_what_the_source_holds(
    count: int, group: int, chunk: Any, more: Any, compressor: str, store: Any
) -> None:
    shape = tuple(a + b for a, b in zip(chunk, more, strict=True))
    rng = np.random.default_rng([count, group, *shape])
    values = rng.normal(size=(*shape, count)).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = np.nan
    values[:, 0, 0, :] = 1  # no date without a value
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        raster = write_npy(root, values) | {
            "chunk": dict(zip(("time", "y", "x"), chunk, strict=True)) | {"feature": group}
        }
        cube = build_cube(root, root / "out", raster, compressor=compressor, splits={"train": 1.0})
        split = cube.split("train")
        # zarr-python knows nothing of samples or groups.
        data, valid = (
            zarr.open_array(cube.store, path=f"cube/{name}", mode="r") for name in ("data", "valid")
        )
        assert data.chunks == valid.chunks == (*chunk, min(group, count))
        assert np.array_equal(data[:, : shape[1], : shape[2]], values, equal_nan=True)
        assert np.array_equal(valid[:], ~np.isnan(data[:]))
        truth = np.pad(data[:], ((0, chunk[0]), (0, 0), (0, 0), (0, 0)), constant_values=np.nan)
        seen = 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="batch_size")
            with ChunkLoader(split, 3, engine="inline", store=store) as loader:
                for batch in loader:
                    for row, at in enumerate(split.origins(batch["index"].numpy()).tolist()):
                        want = truth[
                            tuple(
                                slice(start, start + side)
                                for start, side in zip(at, chunk, strict=True)
                            )
                        ]
                        assert np.array_equal(batch["data"][row].numpy(), want, equal_nan=True)
                        assert np.array_equal(batch["valid"][row].numpy(), ~np.isnan(want))
                        seen += 1
                assert loader.stats.decoded == seen == len(split)


def test_groups_change_neither_samples_nor_splits_nor_the_digest(
    whole: Warehouse, fours: Warehouse
) -> None:
    assert fours.version != whole.version
    assert fours.manifest.digest == whole.manifest.digest
    assert fours.manifest.splits == whole.manifest.splits
    assert (fours.folder / "samples.parquet").read_bytes() == (
        whole.folder / "samples.parquet"
    ).read_bytes()
    assert fours.cube is not None
    assert whole.cube is not None
    assert (fours.cube.layout.group, whole.cube.layout.group) == (4, 6)
    assert fours.cube.features == whole.cube.features


def test_a_group_of_all_features_is_the_plain_layout(
    whole: Warehouse, source: Path, tmp_path: Path
) -> None:
    for size in (6, 99):
        cube = build_cube(source, tmp_path / str(size), grouped(size))
        files = sorted(
            path.relative_to(cube.store)
            for path in (cube.store / "cube/data").rglob("*")
            if path.is_file()
        )  # type: ignore[union-attr]
        assert all(
            (cube.store / path).read_bytes() == (whole.store / path).read_bytes() for path in files
        )


def test_a_cube_built_before_groups_keeps_its_name_and_opens(
    source: Path, whole: Warehouse
) -> None:
    assert "feature" not in job_of(source, SERIES).recipe["settings"]["raster"]["chunk"]
    assert whole.manifest.cube is not None
    older = {key: value for key, value in whole.manifest.cube.items() if key != "feature_group"}
    assert type(whole.cube).of(older).layout.group == 6


@pytest.mark.filterwarnings("ignore:batch_size")
@pytest.mark.parametrize(
    ("engine", "store"), [("spawn", "stream"), ("thread", "mmap"), ("thread", "library")]
)
def test_every_engine_puts_groups_together(
    whole: Warehouse, fours: Warehouse, engine: Any, store: Any
) -> None:
    with (
        ChunkLoader(whole.split("val"), 4, engine="inline", store="mmap", seed=1) as one,
        ChunkLoader(fours.split("val"), 4, engine=engine, store=store, seed=1) as two,
    ):
        for left, right in zip(one, two, strict=True):
            assert left.keys() == right.keys()
            assert all(
                np.array_equal(left[key].numpy(), right[key].numpy(), equal_nan=key == "data")
                for key in left
            )
        assert one.order_digest == two.order_digest
        assert two.stats.decoded == len(fours.split("val"))


class CountingStore(WrapperStore[Store]):
    """Bytes handed out of array data."""

    read = 0

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        if "/data/c/" in key and found is not None:
            self.read += len(found)
        return found


def test_xarray_reads_one_band_without_the_others(
    fours: Warehouse, whole: Warehouse, source: Path, tmp_path: Path
) -> None:
    single = build_cube(source, tmp_path, grouped(1))

    def bytes_for(cube: Warehouse, feature: str) -> int:
        counting = CountingStore(LocalStore(cube.store, read_only=True))
        opened = xr.open_zarr(counting, group="cube", chunks=None, decode_coords="all")
        found = opened.data.sel(feature=feature).values
        assert np.array_equal(
            found,
            whole.split("train").array("data")[..., cube_names(whole).index(feature)],
            equal_nan=True,
        )
        return counting.read

    everything = bytes_for(whole, "red")
    assert bytes_for(single, "class") < everything / 4, "int16 codes of three values"
    assert bytes_for(single, "red") < everything / 3
    assert bytes_for(fours, "class") < bytes_for(fours, "red") < everything
    lazy = single.split("train").xarray()
    assert lazy.chunksizes["feature"] == (1,) * 6
    assert lazy.chunksizes["time"] == (6, 1)


def cube_names(cube: Warehouse) -> list[str]:
    return [feature.name for feature in cube.split("train").features]


def test_a_flipped_bit_in_any_group_is_found(source: Path, tmp_path: Path) -> None:
    cube = build_cube(source, tmp_path, grouped(4))
    assert verify(cube)[1] == []
    path = cube.folder / "warehouse.zarr/cube/data/c/0/0/0/0"
    raw = path.read_bytes()
    index = np.frombuffer(raw[-4 - 16 * 2 * 18 : -4], "<u8").reshape(18, 2, 2)
    for sample, part in ((0, 1), (11, 0)):
        offset, length = index[sample, part].tolist()
        path.write_bytes(
            raw[: offset + length - 8]
            + bytes([raw[offset + length - 8] ^ 4])
            + raw[offset + length - 7 :]
        )
        assert [fault.path for fault in verify(cube)[1]] == ["warehouse.zarr/cube/data/c/0/0/0/0"]
        reader = cube.split("train").reader(verify="always")
        with pytest.raises(
            CorruptError, match=f"inner chunk {2 * sample + part} does not decode: crc32c"
        ):
            reader.chunk("data", 0).read_row(sample, np.empty((3, 8, 8, 6), np.float32), check=True)
        reader.close()
    path.write_bytes(raw)
    assert verify(cube)[1] == []


def test_inspect_says_what_an_inner_chunk_is(fours: Warehouse) -> None:
    head = next(iter(manifest_tables(fours)))
    cells = [str(cell) for column in head.columns for cell in column._cells]
    assert "(3, 8, 8, 4)" in cells
