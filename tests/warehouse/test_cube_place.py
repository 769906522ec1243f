"""Where a cube lies, as others read it.

The zarr conventions proj and spatial, CF, and GDAL itself where it can.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from cube_fakes import EPSG, ORIGIN, SERIES, build_cube, write_series
from rasterio.crs import CRS
from rasterio.warp import transform_bounds

from warehouse import Warehouse

SHARDED_ZARR, PLAIN_ZARR = (3, 13), (3, 12)
"""The first GDAL that reads sharded Zarr v3 and the conventions
(https://gdal.org/drivers/raster/zarr.html), and the first tried that reads plain chunks of it:
3.12.2 did, refusing `sharding_indexed`; 3.10 refuses the codec `bytes`."""


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    root = write_series(tmp_path_factory.mktemp("series"))
    return build_cube(root, tmp_path_factory.mktemp("cube"), SERIES)


@pytest.mark.parametrize("node", ["cube", "cube/data", "cube/valid"])
def test_the_conventions_are_registered_and_kept(cube: Warehouse, node: str) -> None:
    """Names, uuids and required keys as published.

    Zarr-conventions/proj and zarr-conventions/spatial, v0.1.
    """
    attrs = zarr.open(cube.store, mode="r", path=node).attrs.asdict()
    known = {each["name"]: each for each in attrs["zarr_conventions"]}
    assert known["proj"]["uuid"] == "f17cb550-5864-4468-aeb7-f3180cfb622f"
    assert known["spatial"]["uuid"] == "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4"
    for name, each in known.items():
        assert (
            each["schema_url"]
            == f"https://raw.githubusercontent.com/zarr-conventions/{name}/refs/tags/v0.1/schema.json"
        )
    assert attrs["proj:code"] == f"EPSG:{EPSG}"
    assert attrs["proj:wkt2"].startswith("PROJCRS["), "WKT2, not the older PROJCS"
    assert CRS.from_wkt(attrs["proj:wkt2"]) == CRS.from_epsg(EPSG)
    assert attrs["spatial:dimensions"] == ["y", "x"]
    assert attrs["spatial:transform"] == [10, 0, ORIGIN[0], 0, -10, ORIGIN[1]]
    assert attrs["spatial:shape"] == [56, 72]
    assert attrs["spatial:bbox"] == [ORIGIN[0], ORIGIN[1] - 560, ORIGIN[0] + 720, ORIGIN[1]]


def test_a_crs_without_a_code_has_wkt2_alone(tmp_path: Path) -> None:
    root = write_series(tmp_path / "in")
    own = (
        "+proj=tmerc +lat_0=44.2 +lon_0=14.7 +k=0.9993 +x_0=500000 +y_0=5000000 +ellps=WGS84 "
        "+units=m"
    )
    edges = transform_bounds(
        f"EPSG:{EPSG}", own, ORIGIN[0], ORIGIN[1] - 500, ORIGIN[0] + 700, ORIGIN[1]
    )
    raster = SERIES | {
        "grid": {"crs": own, "resolution": 10, "bounds": [10 * round(edge / 10) for edge in edges]}
    }
    attrs = zarr.open_group(build_cube(root, tmp_path / "out", raster).store, mode="r")[
        "cube"
    ].attrs.asdict()
    assert "proj:code" not in attrs
    assert CRS.from_wkt(attrs["proj:wkt2"]).to_dict()["lon_0"] == 14.7


def versions() -> dict[str, tuple[int, ...]]:
    """GDALs here: rasterio's own and the command line's."""
    found = {"rasterio": rasterio.__gdal_version__}
    if shutil.which("gdalinfo"):
        said = subprocess.run(
            ["gdalinfo", "--version"], capture_output=True, text=True, check=True
        ).stdout
        found["gdalinfo"] = said.split()[1].rstrip(",")
    return {name: tuple(int(part) for part in text.split(".")[:2]) for name, text in found.items()}


def test_rioxarray_reads_crs_and_bounds(cube: Warehouse) -> None:
    import rioxarray  # noqa: F401

    opened = xr.open_zarr(cube.store, group="cube", decode_coords="all")
    for name in ("data", "valid"):
        assert opened[name].rio.crs == CRS.from_epsg(EPSG)
        assert opened[name].rio.bounds() == (ORIGIN[0], ORIGIN[1] - 560, ORIGIN[0] + 720, ORIGIN[1])


def unsharded(cube: Warehouse, path: Path) -> Path:
    """The cube's group with `data` in plain chunks, for GDALs that know Zarr v3 but no shards."""
    source = zarr.open_group(cube.store, mode="r")["cube"]
    group = zarr.create_group(path, zarr_format=3).create_group(
        "cube", attributes=source.attrs.asdict()
    )
    for name in ("data", "time", "y", "x", "spatial_ref"):
        each = source[name]
        kept = {"dimension_names": each.metadata.dimension_names} if each.shape else {}
        array = group.create_array(
            name,
            shape=each.shape,
            dtype=each.dtype,
            attributes=each.attrs.asdict(),
            compressors=None,
            chunks=each.chunks if name == "data" else each.shape,
            **kept,
        )
        array[...] = each[...]
    return path


def test_gdal_reads_the_values_where_they_lie(cube: Warehouse, tmp_path: Path) -> None:
    """Its bands are the planes of `data`, dates outside, features inside."""
    found = versions()
    if found["rasterio"] < PLAIN_ZARR:
        listed = ", ".join(
            f"{name} has {'.'.join(map(str, version))}" for name, version in found.items()
        )
        needed = (".".join(map(str, version)) for version in (SHARDED_ZARR, PLAIN_ZARR))
        pytest.skip(
            "GDAL reads sharded Zarr v3 from {} on, plain chunks from {} on; {}".format(
                *needed, listed
            )
        )
    store = (
        cube.store
        if found["rasterio"] >= SHARDED_ZARR
        else unsharded(cube, tmp_path / "plain.zarr")
    )
    truth = cube.split("train").array("data")[:]
    with rasterio.open(f'ZARR:"{store}":/cube/data') as opened:
        assert opened.crs.to_epsg() == EPSG
        assert opened.transform[:6] == (10, 0, ORIGIN[0], 0, -10, ORIGIN[1])
        planes = opened.read()
    assert np.array_equal(planes, np.moveaxis(truth, -1, 1).reshape(planes.shape), equal_nan=True)
