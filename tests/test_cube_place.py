"""Where a cube lies, as others read it: the zarr conventions proj and spatial, CF, and GDAL itself where it can."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
import zarr
from cube_fakes import EPSG, ORIGIN, SERIES, build_cube, write_series
from rasterio.crs import CRS
from rasterio.warp import transform_bounds

from warehouse import Warehouse

SHARDED_ZARR = (3, 13)
"""The first GDAL that reads sharded Zarr v3 and the conventions (https://gdal.org/drivers/raster/zarr.html)."""


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    root = write_series(tmp_path_factory.mktemp("series"))
    return build_cube(root, tmp_path_factory.mktemp("cube"), SERIES)


@pytest.mark.parametrize("node", ["cube", "cube/data", "cube/valid"])
def test_the_conventions_are_registered_and_kept(cube: Warehouse, node: str) -> None:
    """Names, uuids and required keys as published: zarr-conventions/proj and zarr-conventions/spatial, v0.1."""
    attrs = zarr.open(cube.store, mode="r", path=node).attrs.asdict()
    known = {each["name"]: each for each in attrs["zarr_conventions"]}
    assert known["proj"]["uuid"] == "f17cb550-5864-4468-aeb7-f3180cfb622f"
    assert known["spatial"]["uuid"] == "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4"
    for name, each in known.items():
        assert each["schema_url"] == f"https://raw.githubusercontent.com/zarr-conventions/{name}/refs/tags/v0.1/schema.json"
    assert attrs["proj:code"] == f"EPSG:{EPSG}"
    assert attrs["proj:wkt2"].startswith("PROJCRS["), "WKT2, not the older PROJCS"
    assert CRS.from_wkt(attrs["proj:wkt2"]) == CRS.from_epsg(EPSG)
    assert attrs["spatial:dimensions"] == ["y", "x"]
    assert attrs["spatial:transform"] == [10, 0, ORIGIN[0], 0, -10, ORIGIN[1]]
    assert attrs["spatial:shape"] == [56, 72]
    assert attrs["spatial:bbox"] == [ORIGIN[0], ORIGIN[1] - 560, ORIGIN[0] + 720, ORIGIN[1]]


def test_a_crs_without_a_code_has_wkt2_alone(tmp_path: Path) -> None:
    root = write_series(tmp_path / "in")
    own = "+proj=tmerc +lat_0=44.2 +lon_0=14.7 +k=0.9993 +x_0=500000 +y_0=5000000 +ellps=WGS84 +units=m"
    edges = transform_bounds(f"EPSG:{EPSG}", own, ORIGIN[0], ORIGIN[1] - 500, ORIGIN[0] + 700, ORIGIN[1])
    raster = SERIES | {"grid": {"crs": own, "resolution": 10, "bounds": [10 * round(edge / 10) for edge in edges]}}
    attrs = zarr.open_group(build_cube(root, tmp_path / "out", raster).store, mode="r")["cube"].attrs.asdict()
    assert "proj:code" not in attrs
    assert CRS.from_wkt(attrs["proj:wkt2"]).to_dict()["lon_0"] == 14.7


def versions() -> dict[str, tuple[int, ...]]:
    """GDALs here: rasterio's own and the command line's."""
    found = {"rasterio": rasterio.__gdal_version__}
    if shutil.which("gdalinfo"):
        said = subprocess.run(["gdalinfo", "--version"], capture_output=True, text=True, check=True).stdout
        found["gdalinfo"] = said.split()[1].rstrip(",")
    return {name: tuple(int(part) for part in text.split(".")[:2]) for name, text in found.items()}


def test_gdal_reads_the_values_where_they_lie(cube: Warehouse) -> None:
    found = versions()
    if found["rasterio"] < SHARDED_ZARR:
        listed = ", ".join(f"{name} has {'.'.join(map(str, version))}" for name, version in found.items())
        pytest.skip(f"GDAL reads sharded Zarr v3 from {'.'.join(map(str, SHARDED_ZARR))} on; {listed}")
    truth = cube.split("train").array("data")
    with rasterio.open(f'ZARR:"{cube.store}":/cube/data:0:0') as opened:
        assert opened.crs.to_epsg() == EPSG
        assert opened.transform[:6] == (10, 0, ORIGIN[0], 0, -10, ORIGIN[1])
        planes = opened.read()
    whole = np.moveaxis(truth[:], -1, 1)
    assert any(np.array_equal(planes[0], plane, equal_nan=True) for plane in whole.reshape(-1, *whole.shape[2:]))
