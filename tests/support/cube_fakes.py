"""Small raster series with known values, and cubes built of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from ingest.jobs import CubeJob
from ingest.rasters.settings import RasterSettings
from warehouse import Warehouse
from warehouse.settings import BuildSettings
from warehouse.write.publish import bake, open_root

DATES = ("20200105", "20200210", "20200307", "20210401", "20210520", "20220611", "20220701")
ORIGIN = (500_000.0, 5_000_000.0)
EPSG = 32633


def write_tif(
    path: Path,
    bands: np.ndarray,
    *,
    shift: tuple[float, float] = (0, 0),
    epsg: int | None = EPSG,
    nodata: float | None = None,
    pixel: float = 10.0,
) -> Path:
    """bands: [band, y, x]; shift: of the origin, in units of the CRS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    transform = Affine(pixel, 0, ORIGIN[0] + shift[0], 0, -pixel, ORIGIN[1] + shift[1])
    crs = None if epsg is None else CRS.from_epsg(epsg)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=bands.dtype,
        crs=crs,
        transform=transform,
        nodata=nodata,
        tiled=True,
        blockxsize=16,
        blockysize=16,
    ) as file:
        file.write(bands)
    return path


def scene(number: int, size: tuple[int, int] = (50, 70)) -> np.ndarray:
    """uint8 [2, y, x]; 0 is missing: some holes in band 2 alone, some in both."""
    rng = np.random.default_rng([7, number])
    bands = rng.integers(1, 256, (2, *size)).astype(np.uint8)
    bands[1][rng.random(size) < 0.05] = 0
    bands[:, : 3 + number, :4] = 0
    return bands


def write_series(
    root: Path, dates: tuple[str, ...] = DATES, size: tuple[int, int] = (50, 70)
) -> Path:
    """s_<date>.tif of two bands, and classes.tif, one for all dates."""
    for number, date in enumerate(dates):
        write_tif(root / "scenes" / f"s_{date}.tif", scene(number, size), nodata=0)
    rng = np.random.default_rng(3)
    write_tif(root / "classes.tif", rng.choice(np.array([0, 5, 17], np.int16), (1, *size)))
    return root


SERIES: dict[str, Any] = {
    "time": {"pattern": r"s_(?P<date>\d{8})"},
    "features": [
        {"name": "red", "files": "scenes/*.tif", "band": 1},
        {"name": "nir", "files": "scenes/*.tif", "band": 2},
        {"name": "ndvi", "index": "ndvi", "red": "red", "nir": "nir"},
        {
            "name": "level",
            "kind": "categorical",
            "index": "classes",
            "source": "ndvi",
            "breaks": [-0.2, 0.3],
            "codes": [3, 1, 2],
        },
        {
            "name": "cover",
            "kind": "canopy",
            "index": "cover",
            "red": 1,
            "nir": 2,
            "files": "scenes/*.tif",
        },
        {
            "name": "class",
            "files": "classes.tif",
            "kind": "categorical",
            "codes": [0, 5, 17],
            "static": True,
        },
    ],
    "chunk": {"time": 3, "y": 8, "x": 8},
    "shard": {"time": 6, "y": 24, "x": 24},
    "block": {"y": 16, "x": 16},
}


def job_of(root: Path, raster: dict[str, Any], **build: Any) -> CubeJob:
    return CubeJob(BuildSettings(input_root=str(root), **build), RasterSettings(**raster))


def build_cube(
    root: Path,
    output: Path,
    raster: dict[str, Any] = SERIES,
    *,
    workers: int = 0,
    clear: bool = False,
    **build: Any,
) -> Warehouse:
    job = job_of(root, raster, **build)
    open_root(output)
    bake(
        job.plan,
        job.loader,
        output,
        workers=workers,
        cluster=None,
        trace=True,
        on_plan=lambda _: None,
        clear=clear,
        preload=job.preload,
    )
    return Warehouse.open(output)


def expected_series(dates: tuple[str, ...] = DATES, size: tuple[int, int] = (50, 70)) -> np.ndarray:
    """[time, y, x, feature] of SERIES on its own grid, from the arrays the files were made of."""
    planes = []
    rng = np.random.default_rng(3)
    classes = rng.choice(np.array([0, 5, 17], np.int16), (1, *size))[0].astype(np.float32)
    for number in range(len(dates)):
        red, nir = (
            np.where(band == 0, np.nan, band).astype(np.float32) for band in scene(number, size)
        )
        ndvi = (nir - red) / (nir + red)
        level = np.select([np.isnan(ndvi), ndvi < -0.2, ndvi < 0.3], [np.nan, 3, 1], 2)
        cover = np.clip((ndvi - 0.2) / 0.6, 0, 1) * 100
        planes.append(np.stack([red, nir, ndvi, level, cover, classes], axis=-1))
    return np.stack(planes).astype(np.float32)
