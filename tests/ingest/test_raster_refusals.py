"""Every way a raster source can be bad.

A typed error that names the file and a remedy, and nothing published.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from cube_fakes import (
    DATES,
    EPSG,
    SERIES,
    build_cube,
    expected_series,
    job_of,
    scene,
    write_series,
    write_tif,
)

from ingest.rasters.grids import read_extent
from ingest.rasters.readers.opening import open_raster
from ingest.rasters.settings import RasterSettings
from warehouse import WarehouseError
from warehouse.errors import ConfigError, SourceError


def no_crs(root: Path) -> None:
    write_tif(root / "scenes/s_20200105.tif", scene(0), nodata=0, epsg=None)


def other_crs(root: Path) -> None:
    write_tif(root / "scenes/s_20200210.tif", scene(1), nodata=0, epsg=32632)


def elsewhere(root: Path) -> None:
    write_tif(root / "scenes/s_20200307.tif", scene(2), nodata=0, shift=(90_000, 0))


def stray_code(root: Path) -> None:
    write_tif(root / "classes.tif", np.full((1, 50, 70), 9, np.int16))


def nan_code(root: Path) -> None:
    values = np.zeros((1, 50, 70), np.float32)
    values[0, 20, 20] = np.nan
    write_tif(root / "classes.tif", values)


def empty_date(root: Path) -> None:
    write_tif(root / "scenes/s_20210401.tif", np.zeros((2, 50, 70), np.uint8), nodata=0)


def two_of_one_date(root: Path) -> None:
    write_tif(root / "scenes/s_20200105_b.tif", scene(0), nodata=0)


def truncated(root: Path) -> None:
    path = root / "scenes/s_20210520.tif"
    path.write_bytes(path.read_bytes()[:-2500])


def beheaded(root: Path) -> None:
    path = root / "scenes/s_20210520.tif"
    path.write_bytes(path.read_bytes()[:5])


def nothing(root: Path) -> None:
    pass


def feature(at: int, **change: Any) -> dict[str, Any]:
    return {
        "features": [
            each | (change if number == at else {})
            for number, each in enumerate(SERIES["features"])
        ]
    }


@pytest.mark.parametrize(
    ("spoil", "change", "words"),
    [
        (no_crs, {}, "no CRS.*s_20200105.tif.*rio edit-info"),
        (other_crs, {}, "different CRS.*s_20200210.tif.*raster.grid"),
        (elsewhere, {"grid": {"like": "classes.tif"}}, "does not overlap.*s_20200307.tif"),
        (nothing, feature(1, band=3), "no band 3.*expected one of 1, 2"),
        (nothing, feature(1, band="lai"), "no band 'lai'"),
        (stray_code, {}, "code that is not declared.*classes.tif.*found 9"),
        (nan_code, {}, "NaN in a feature of integer codes.*classes.tif"),
        (empty_date, {}, "no valid value.*2021-04-01.*s_20210401.tif.*empty_dates keep"),
        (two_of_one_date, {}, "the date 2020-01-05.*found also"),
        (truncated, {}, "cannot be read.*s_20210520.tif"),
        (beheaded, {}, "cannot be read.*s_20210520.tif"),
        (
            nothing,
            {"chunk": {"time": 3, "y": 64, "x": 8}, "shard": {}, "block": {}},
            "fewer rows than one inner chunk.*found 50",
        ),
        (
            nothing,
            {"chunk": {"time": 3, "y": 8, "x": 72}, "shard": {}, "block": {}},
            "fewer columns than one inner chunk.*found 70",
        ),
        (
            nothing,
            {"chunk": {"time": 9, "y": 8, "x": 8}, "shard": {}},
            "fewer dates than one inner chunk.*found 7",
        ),
        (nothing, feature(0, files="nowhere/*.tif"), "no raster matches"),
        (nothing, {"time": {"pattern": r"t_(?P<date>\d{8})"}}, "name holds no date"),
        (
            nothing,
            feature(5, files="scenes/*.tif", codes=[0]),
            "static feature has more than one file",
        ),
        (nothing, {"guard": 9}, "no inner chunk is left for training"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_bad_source_is_named_with_a_remedy_and_nothing_is_published(
    tmp_path: Path, spoil: Any, change: Any, words: str
) -> None:
    spoil(write_series(tmp_path / "in"))
    with pytest.raises(WarehouseError, match=words) as raised:
        build_cube(tmp_path / "in", tmp_path / "out", SERIES | change)
    assert raised.value.remedy
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out/CURRENT").exists()


def test_a_file_truncated_in_the_middle_of_a_build_is_named_and_the_rest_kept(
    tmp_path: Path,
) -> None:
    root, output = write_series(tmp_path / "in"), tmp_path / "out"
    job = job_of(root, SERIES)
    job.plan({})
    truncated(root)
    with pytest.raises(SourceError, match=r"s_20210520\.tif"):
        [job.loader(None)(chunk) for chunk in range(3)]  # type: ignore[arg-type]
    # Put right, the same command builds the same version as if nothing had been.
    write_tif(root / "scenes/s_20210520.tif", scene(4), nodata=0)
    assert np.allclose(
        build_cube(root, output).split("train").array("data")[:, :50, :70],
        expected_series(),
        rtol=1e-6,
        equal_nan=True,
    )


def test_a_file_truncated_after_its_first_window_was_read_is_named(tmp_path: Path) -> None:
    """Its size was checked already: what is left is what GDAL says of the missing tiles."""
    root = write_series(tmp_path / "in")
    job = job_of(root, SERIES)
    plan = job.plan({})
    loader = job.loader(None)  # type: ignore[arg-type]
    assert len(plan.splits[0].payloads) > 2
    list(loader(0).samples)
    truncated(root)
    with pytest.raises(SourceError, match=r"cannot be read.*s_20210520\.tif") as raised:
        [list(loader(chunk).samples) for chunk in plan.splits[0].payloads[1:]]
    assert raised.value.remedy


@pytest.mark.parametrize("change", ["cut", "changed", "gone"])
def test_a_zarr_source_that_changes_during_a_build_is_named(tmp_path: Path, change: str) -> None:
    write_extent(tmp_path / "box.geojson")
    place = {"y": 200 - 10 * (np.arange(20) + 0.5), "x": 10 * (np.arange(20) + 0.5)}
    reference = ((), 0, {"crs_wkt": rasterio.crs.CRS.from_epsg(EPSG).to_wkt()})
    dataset = xr.Dataset(
        {"lai": (("y", "x"), np.ones((20, 20), np.float32)), "spatial_ref": reference}, coords=place
    )
    dataset.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
    features = [{"name": "lai", "files": "a.zarr", "band": "lai", "static": True}]
    job = job_of(tmp_path, {"features": features, "chunk": {"time": 1, "y": 10, "x": 10}})
    job.plan({})
    chunk = next(path for path in sorted((tmp_path / "a.zarr/lai/c").rglob("*")) if path.is_file())
    if change == "gone":
        chunk.unlink()
    else:
        raw = chunk.read_bytes()
        chunk.write_bytes(raw[:-3] if change == "cut" else raw + b"x")
    with pytest.raises(
        SourceError,
        match=r"(changed|vanished) during the build.*a\.zarr/lai/c/0/0.*run the same command again",
    ):
        job.loader(None)(0)  # type: ignore[arg-type]


def test_a_truncated_npy_is_named(tmp_path: Path) -> None:
    write_extent(tmp_path / "box.geojson")
    path = tmp_path / "a.npy"
    np.save(path, np.ones((1, 20, 20, 1), np.float32))
    source = open_raster(path, tmp_path / "box.geojson")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(SourceError, match=r"cannot be read.*a\.npy"):
        open_raster(path, tmp_path / "box.geojson")
    with pytest.raises(SourceError, match=r"cannot be read.*a\.npy"):
        source.read(0, [1], (0, 0, 20, 20))


def test_times_with_an_offset_are_utc(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 20, 20, 1), np.float32))
    # By the clock on the wall the second is earlier.
    (tmp_path / "times.json").write_text(
        json.dumps(["2020-06-01T00:30:00+02:00", "2020-05-31T23:00:00Z"])
    )
    write_extent(tmp_path / "box.geojson")
    raster = {
        "grid": {"geojson": "box.geojson"},
        "time": {"file": "times.json"},
        "features": [{"name": "a", "files": "a.npy"}],
        "chunk": {"time": 1, "y": 10, "x": 10},
    }
    cube = build_cube(tmp_path, tmp_path / "out", raster)
    assert cube.cube is not None
    assert cube.cube.times == ("2020-05-31T22:30:00", "2020-05-31T23:00:00")


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (["2020-01-02", "2020-01-01"], "not sorted.*a.nc.*2020-01-01"),
        (["2020-01-01", "2020-01-01"], "date stands twice.*a.nc"),
        (["2020-01-01", "NaT"], "date is missing.*a.nc.*step 1"),
    ],
)
def test_bad_dates_inside_a_file(tmp_path: Path, times: list[str], words: str) -> None:
    place = {
        "time": np.array(times, "datetime64[ns]"),
        "y": 200 - 10 * (np.arange(20) + 0.5),
        "x": 10 * (np.arange(20) + 0.5),
    }
    reference = ((), 0, {"crs_wkt": rasterio.crs.CRS.from_epsg(EPSG).to_wkt()})
    dataset = xr.Dataset(
        {"lai": (("time", "y", "x"), np.ones((2, 20, 20), np.float32)), "spatial_ref": reference},
        coords=place,
    )
    dataset.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    raster = {
        "features": [{"name": "lai", "files": "a.nc", "band": "lai"}],
        "chunk": {"time": 1, "y": 10, "x": 10},
    }
    with pytest.raises(SourceError, match=words) as raised:
        build_cube(tmp_path, tmp_path / "out", raster)
    assert raised.value.remedy


def test_empty_dates_can_be_kept(tmp_path: Path) -> None:
    empty_date(write_series(tmp_path / "in"))
    cube = build_cube(tmp_path / "in", tmp_path / "out", SERIES | {"empty_dates": "keep"})
    assert np.isnan(cube.split("train").array("data")[3, ..., 0]).all()


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (["2020-01-01", "2020-01-03", "2020-01-02"], "not sorted.*times.json.*2020-01-02"),
        (["2020-01-01", "2020-01-01", "2020-01-02"], "date stands twice.*times.json"),
        (["2020-01-01", "2020-01-02"], "expected 3 dates"),
        (["2020-01-01", "soon", "later"], "does not parse.*times.json"),
    ],
)
def test_bad_side_files_of_dates(tmp_path: Path, times: list[str], words: str) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 20, 20, 1), np.float32))
    (tmp_path / "times.json").write_text(json.dumps(times))
    write_extent(tmp_path / "box.geojson")
    raster = {
        "grid": {"geojson": "box.geojson"},
        "time": {"file": "times.json"},
        "features": [{"name": "a", "files": "a.npy"}],
        "chunk": {"time": 1, "y": 10, "x": 10},
    }
    with pytest.raises(SourceError, match=words):
        build_cube(tmp_path, tmp_path / "out", raster)


def write_extent(
    path: Path, corners: Any = ((0, 0), (0, 200), (200, 200), (200, 0), (0, 0))
) -> None:
    crs = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{EPSG}"}}
    path.write_text(json.dumps({"type": "Polygon", "crs": crs, "coordinates": [corners]}))


def test_an_extent_is_an_upright_rectangle_with_a_crs(tmp_path: Path) -> None:
    path = tmp_path / "box.geojson"
    write_extent(path)
    assert read_extent(path)[1] == (0, 0, 200, 200)
    write_extent(path, ((0, 0), (10, 200), (200, 200), (200, 0), (0, 0)))
    with pytest.raises(SourceError, match="upright"):
        read_extent(path)
    path.write_text('{"type": "Polygon", "coordinates": [[[0, 0]]]}')
    with pytest.raises(SourceError, match="named CRS"):
        read_extent(path)


def test_a_npy_needs_an_extent_and_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4)))
    with pytest.raises(SourceError, match="where it lies"):
        open_raster(tmp_path / "a.npy")
    write_extent(tmp_path / "box.geojson")
    np.save(tmp_path / "b.npy", np.array([["a"]]))
    with pytest.raises(SourceError, match="no raster"):
        open_raster(tmp_path / "b.npy", tmp_path / "box.geojson")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": [{"name": "a", "files": "x", "kind": "categorical"}]}, "codes"),
        (
            {
                "features": [
                    {
                        "name": "a",
                        "files": "x",
                        "kind": "categorical",
                        "codes": [1],
                        "resampling": "bilinear",
                    }
                ]
            },
            "nearest or mode",
        ),
        ({"features": [{"name": "a", "files": "x", "resampling": "mode"}]}, "bilinear or average"),
        ({"features": [{"name": "a"}]}, "needs files"),
        (
            {"features": [{"name": "a", "index": "ndvi", "red": "r", "nir": "n"}]},
            "no feature above it",
        ),
        ({"features": [{"name": "a", "index": "ndvi", "red": 1}]}, "needs nir"),
        ({"features": [{"name": "a", "files": "x"}, {"name": "a", "files": "y"}]}, "two features"),
        ({"shard": {"y": 33}}, "multiple of chunk.y"),
        ({"grid": {"crs": "EPSG:4326"}}, "belong together"),
        ({"grid": {"like": "a", "geojson": "b"}}, "nothing else"),
        ({"time": {"pattern": r"\d+"}}, "group"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RasterSettings(**change)


def test_files_cannot_lead_out_of_the_input_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    with pytest.raises(ConfigError, match="lead out"):
        job_of(tmp_path / "in", SERIES | feature(0, files="../*.tif"))
    write_tif(tmp_path / "secret.tif", scene(0), nodata=0)
    (tmp_path / "in/scenes/s_20230101.tif").symlink_to(tmp_path / "secret.tif")
    with pytest.raises(SourceError, match="link leads out"):
        job_of(tmp_path / "in", SERIES)
    assert len(DATES) == 7
