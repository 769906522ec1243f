"""Rasters in: real scenes against an independent reading, and every kind of file.

What is refused: tests/ingest/test_raster_refusals.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from cube_fakes import EPSG, ORIGIN, SERIES, build_cube, write_series, write_tif
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ingest.rasters.grids import Grid
from ingest.rasters.indices import compute
from ingest.rasters.resample import warp
from ingest.rasters.settings import RasterFeature
from warehouse import Warehouse

NAIP: dict[str, Any] = {
    "grid": {"like": "naip/m_4709963_se_14_1_20090818.tif"},
    "time": {"pattern": r"_(?P<date>\d{8})\.tif$"},
    "features": [
        *(
            {"name": name, "files": "naip/*.tif", "band": at}
            for at, name in enumerate(("red", "green", "blue", "nir"), 1)
        ),
        {"name": "ndvi", "index": "ndvi", "red": "red", "nir": "nir"},
        {
            "name": "ndvi_class",
            "kind": "categorical",
            "index": "classes",
            "source": "ndvi",
            "breaks": [0.0, 0.2, 0.4],
            "codes": [0, 1, 2, 3],
        },
        {
            "name": "cover",
            "kind": "canopy",
            "index": "cover",
            "red": "red",
            "nir": "nir",
            "units": "%",
        },
    ],
}
SENTINEL: dict[str, Any] = {
    "grid": {"geojson": "bbox.geojson"},
    "time": {"file": "timestamps.json"},
    "features": [
        {"name": "NDVI", "files": "data/NDVI.npy"},
        {"name": "CLP", "files": "data/CLP.npy"},
        {"name": "CLM", "files": "mask/CLM.npy", "kind": "categorical", "codes": [0, 1]},
        {
            "name": "LULC",
            "files": "mask_timeless/LULC.npy",
            "kind": "categorical",
            "codes": [0, 1, 2, 3, 4, 8],
            "static": True,
        },
        {"name": "DEM", "files": "data_timeless/DEM.npy", "static": True, "units": "m"},
        {"name": "clear", "files": "data/NDVI.npy", "mask": "mask/IS_VALID.npy"},
    ],
}


@pytest.fixture(scope="module")
def naip(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    return build_cube(shared_data / "opengeos", tmp_path_factory.mktemp("naip"), NAIP)


def bilinear(raw: NDArray[Any], columns: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
    """Values of a band (0 missing) at pixel places: weights of the four centres around, missing
    ones left out; NaN where the pixel below the place is missing."""
    height, width = raw.shape
    total, weights = np.zeros(len(rows)), np.zeros(len(rows))
    for down in (0, 1):
        for right in (0, 1):
            r, c = (
                np.floor(rows - 0.5).astype(int) + down,
                np.floor(columns - 0.5).astype(int) + right,
            )
            weight = (1 - np.abs(rows - 0.5 - r)) * (1 - np.abs(columns - 0.5 - c))
            weight *= (r >= 0) & (r < height) & (c >= 0) & (c < width)
            value = raw[np.clip(r, 0, height - 1), np.clip(c, 0, width - 1)]
            total, weights = total + weight * value * (value != 0), weights + weight * (value != 0)
    at = np.floor(rows).astype(int), np.floor(columns).astype(int)
    inside = (at[0] >= 0) & (at[0] < height) & (at[1] >= 0) & (at[1] < width)
    valid = inside & (raw[np.clip(at[0], 0, height - 1), np.clip(at[1], 0, width - 1)] != 0)
    return np.where(valid, total / np.where(weights > 0, weights, 1), np.nan)


def test_naip_equals_an_independent_reading_at_random_places(
    naip: Warehouse, shared_data: Path
) -> None:
    files = sorted((shared_data / "opengeos/naip").glob("*.tif"))
    data = naip.split("train").array("data")[:]
    rng = np.random.default_rng(0)
    with rasterio.open(files[0]) as like:
        origin, height, width = like.transform, like.height, like.width
    for date, path in enumerate(files):
        with rasterio.open(path) as file:
            bands, own = file.read(), file.transform
        rows, columns = rng.integers(0, height, 100), rng.integers(0, width, 100)
        # The first and last rows and columns of the grid are where shifted scenes end.
        rows[:10], columns[10:20], rows[20:30], columns[30:40] = 0, 0, height - 1, width - 1
        x, y = origin.c + origin.a * (columns + 0.5), origin.f + origin.e * (rows + 0.5)
        place = (x - own.c) / own.a, (y - own.f) / own.e
        red, green, blue, nir = (bilinear(band, *place) for band in bands)
        ndvi = (nir - red) / (nir + red)
        level = np.select([np.isnan(ndvi), ndvi < 0, ndvi < 0.2, ndvi < 0.4], [np.nan, 0, 1, 2], 3)
        want = np.stack(
            [red, green, blue, nir, ndvi, level, np.clip((ndvi - 0.2) / 0.6, 0, 1) * 100], axis=-1
        )
        found = data[date, rows, columns]
        assert np.array_equal(np.isnan(found), np.isnan(want))
        edge = np.min(np.abs(np.nan_to_num(ndvi)[:, None] - [0, 0.2, 0.4]), axis=1) < 1e-4
        assert np.allclose(found[:, :5], want[:, :5], atol=1e-3, equal_nan=True)
        assert np.allclose(found[:, 6], want[:, 6], atol=1e-3, equal_nan=True)
        assert np.array_equal(found[~edge, 5], want[~edge, 5], equal_nan=True)


def test_the_2014_holes_are_in_nir_and_what_is_made_of_it_alone(
    naip: Warehouse, shared_data: Path
) -> None:
    path = next((shared_data / "opengeos/naip").glob("*20140720.tif"))
    with rasterio.open(path) as file:
        bands, own = file.read(), file.transform
    lonely = (bands[3] == 0) & (bands[:3] != 0).all(axis=0)
    assert lonely.sum() == 2837
    rows, columns = np.nonzero(lonely)
    valid = naip.split("train").array("valid")[3]
    with rasterio.open(path.with_name("m_4709963_se_14_1_20090818.tif")) as like:
        origin = like.transform
    # Of each hole, the voxel whose centre lies in it.
    down = np.ceil((origin.f - (own.f + own.e * rows)) / 5 - 0.5).astype(int)
    inside = (down >= 0) & (down < 724)
    across = columns[inside] + round((own.c - origin.c) / 5)
    assert not valid[down[inside], across, 3].any()
    assert not valid[down[inside], across, 4:].any()
    assert valid[down[inside], across, :3].all()


def test_naip_lies_where_gdal_says(naip: Warehouse) -> None:
    import rioxarray  # noqa: F401

    opened = xr.open_zarr(naip.store, group="cube", decode_coords="all")
    assert opened.data.rio.crs.to_epsg() == 26914
    left, bottom, right, top = opened.data.rio.bounds()
    assert (left, top) == (485900.0, 5209247.0)
    assert (right, bottom) == (485900.0 + 960 * 5, 5209247.0 - 736 * 5)
    assert [str(date)[:4] for date in opened.time.values] == [
        "2009",
        "2010",
        "2012",
        *map(str, range(2014, 2021)),
    ]


def test_sentinel2_patch_is_what_its_arrays_hold(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "sentinel2_patch"
    cube = build_cube(root, tmp_path, SENTINEL)
    data = cube.split("train").array("data")[:]
    assert data.shape == (68, 128, 128, 6)
    for at, name in enumerate(("data/NDVI", "data/CLP", "mask/CLM")):
        assert np.array_equal(
            data[:, :101, :100, at], np.load(root / f"{name}.npy")[..., 0].astype(np.float32)
        )
    for at, name in ((3, "mask_timeless/LULC"), (4, "data_timeless/DEM")):
        assert (
            data[:, :101, :100, at] == np.load(root / f"{name}.npy")[..., 0].astype(np.float32)
        ).all()
    seen = np.load(root / "mask/IS_VALID.npy")[..., 0]
    assert np.array_equal(
        data[:, :101, :100, 5], np.where(seen, data[:, :101, :100, 0], np.nan), equal_nan=True
    )
    assert np.isnan(data[:, 101:]).all()
    assert cube.cube is not None
    assert cube.cube.times[7:9] == ("2015-12-08T10:04:09", "2015-12-08T10:11:25"), (
        "two scenes on one day are two dates"
    )


@given(
    st.floats(-3, 3),
    st.floats(-3, 3),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from(["nearest", "bilinear", "average", "mode"]),
)
@example(-1.192092896e-07, 0.0, 0, 14, "mode")
@example(0.0, 7.7e-6, 3, 20, "mode")
@settings(max_examples=40, deadline=None)
def test_no_value_depends_on_how_the_cube_is_cut(
    shift_x: float, shift_y: float, row: int, column: int, method: str
) -> None:
    rng = np.random.default_rng(1)
    plane = rng.integers(0, 5, (40, 40)).astype(np.float32)
    plane[rng.random(plane.shape) < 0.1] = np.nan
    wkt = rasterio.crs.CRS.from_epsg(EPSG).to_wkt()
    source = Grid(wkt, (10.0, 0.0, shift_x, 0.0, -10.0, shift_y), 40, 40)
    target = Grid(wkt, (12.0, 0.0, 0.0, 0.0, -12.0, 0.0), 32, 32)
    whole = warp(plane, source, (0, 0, 40, 40), target, (0, 0, 32, 32), method)
    window = (row, column, 10, 11)
    part = source.window_of(target, window)
    assert part is not None
    rows, columns = slice(part[0], part[0] + part[2]), slice(part[1], part[1] + part[3])
    cut = warp(plane[rows, columns], source, part, target, window, method)
    assert np.allclose(cut, whole[row : row + 10, column : column + 11], atol=1e-5, equal_nan=True)


def test_another_crs_and_pixel_size_land_on_the_grid(tmp_path: Path) -> None:
    """A plane of x + 2y in UTM comes out of a geographic copy of it."""
    write_series(tmp_path)
    wgs = rasterio.crs.CRS.from_epsg(4326)
    from rasterio.warp import transform

    lon, lat = transform(
        f"EPSG:{EPSG}", wgs, [ORIGIN[0] - 500, ORIGIN[0] + 1300], [ORIGIN[1] + 300, ORIGIN[1] - 900]
    )
    columns, rows = np.linspace(lon[0], lon[1], 400), np.linspace(lat[0], lat[1], 300)
    step = (columns[1] - columns[0], rows[1] - rows[0])
    grid_lon, grid_lat = np.meshgrid(columns + step[0] / 2, rows + step[1] / 2)
    x, y = transform(wgs, f"EPSG:{EPSG}", grid_lon.ravel(), grid_lat.ravel())
    plane = (
        ((np.array(x) - ORIGIN[0]) + 2 * (np.array(y) - ORIGIN[1]))
        .reshape(300, 400)
        .astype(np.float32)
    )
    with rasterio.open(
        tmp_path / "plane.tif",
        "w",
        driver="GTiff",
        count=1,
        height=300,
        width=400,
        dtype="float32",
        crs=wgs,
        transform=rasterio.Affine(step[0], 0, lon[0], 0, step[1], lat[0]),
    ) as file:
        file.write(plane, 1)
    features = [*SERIES["features"], {"name": "plane", "files": "plane.tif", "static": True}]
    cube = build_cube(
        tmp_path, tmp_path / "out", SERIES | {"features": features, "grid": {"like": "classes.tif"}}
    )
    found = cube.split("train").array("data")[0, :50, :70, 6]
    want = (np.arange(70) + 0.5) * 10 - 2 * (np.arange(50)[:, None] + 0.5) * 10
    assert np.abs(found - want).max() < 0.2 * 5**0.5, (
        "a fiftieth of a pixel along the steepest slope"
    )


def test_netcdf_and_zarr_are_read_through_xarray(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((4, 20, 30)).astype(np.float32)
    values[1, 3, 4] = np.nan
    place = {
        "time": np.array(
            ["2020-01-01", "2020-02-03", "2020-02-04", "2021-01-01"], "datetime64[ns]"
        ),
        "y": ORIGIN[1] - 10 * (np.arange(20) + 0.5),
        "x": ORIGIN[0] + 10 * (np.arange(30) + 0.5),
    }
    reference = ((), 0, {"crs_wkt": rasterio.crs.CRS.from_epsg(EPSG).to_wkt()})
    dataset = xr.Dataset(
        {"lai": (("time", "y", "x"), values), "spatial_ref": reference}, coords=place
    )
    dataset.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    dataset.to_zarr(tmp_path / "b.zarr", zarr_format=3, consolidated=False)
    features = [
        {"name": name, "files": files, "band": "lai"}
        for name, files in (("a", "a.nc"), ("b", "b.zarr"))
    ]
    cube = build_cube(
        tmp_path, tmp_path / "out", {"features": features, "chunk": {"time": 2, "y": 10, "x": 10}}
    )
    data = cube.split("train").array("data")[:]
    assert np.array_equal(data[..., 0], values, equal_nan=True)
    assert np.array_equal(data[..., 1], values, equal_nan=True)


def test_a_feature_without_a_date_is_missing_there(tmp_path: Path) -> None:
    write_series(tmp_path)
    write_tif(tmp_path / "late" / "s_20220701.tif", np.full((1, 50, 70), 7, np.uint8))
    features = [SERIES["features"][0], {"name": "late", "files": "late/*.tif"}]
    data = (
        build_cube(tmp_path, tmp_path / "out", SERIES | {"features": features})
        .split("train")
        .array("data")[:]
    )
    assert np.isnan(data[:6, ..., 1]).all()
    assert (data[6, :50, :70, 1] == 7).all()


def test_indices_are_their_formulas() -> None:
    red, nir = np.array([[10, 0, 50, np.nan]], np.float32), np.array([[30, 0, 50, 5]], np.float32)
    ndvi = compute(
        RasterFeature(name="a", index="ndvi", red="r", nir="n"), {"red": red, "nir": nir}
    )
    assert np.array_equal(ndvi, np.array([[0.5, np.nan, 0, np.nan]], np.float32), equal_nan=True)
    ndwi = compute(
        RasterFeature(name="a", index="ndwi", green="g", nir="n"), {"green": red, "nir": nir}
    )
    assert np.array_equal(ndwi, -ndvi, equal_nan=True)
    cover = compute(
        RasterFeature(name="a", index="cover", red="r", nir="n"), {"red": red, "nir": nir}
    )
    assert np.allclose(cover, [[50, np.nan, 0, np.nan]], equal_nan=True)
