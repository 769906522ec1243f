"""From declared features to one stored chunk of a cube: read windows, warp them onto the grid,
compute indices, check values.

A `Layer` is what one feature needs from files: at most one frame (file, step) a date. Of every
file, each window is read once, all its bands together. Warping is GDAL's, band by band with an
exact transform, so that a voxel is valid where the source pixel below its centre is, and no value
depends on how the cube is cut. Indices are computed from warped values. Memory: one stored chunk as
float32 and its validity, and the windows of one file.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid
from ingest.rasters.readers import missing_at, open_raster
from ingest.rasters.settings import RasterFeature
from warehouse.errors import SourceError
from warehouse.layouts.cube_geometry import CubeLayout, Feature
from warehouse.layouts.cube_stats import block_facts
from warehouse.write.bake import Block

__all__ = ["CubeLoader", "Frame", "Layer", "compute"]

Plane = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Frame:
    """One date of one file. path: below the input root; step.

    Its place along the file's own time axis.
    """

    path: str
    step: int | None = None
    extent: str | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """What is read for a feature or one of its inputs: a band of one frame a date (static.

    Of one frame for all).
    """

    frames: tuple[Frame | None, ...]
    band: int | str
    method: str
    nodata: float | None = None
    static: bool = False
    integers: bool = False

    def frame(self, date: int) -> Frame | None:
        return self.frames[0 if self.static else date]


@dataclass(frozen=True)
class CubeLoader:
    """`load` of the builder: number of a stored chunk -> its inner chunks. Travels to workers;
    opens files there.

    layers: by feature and role ("" for the feature itself, "mask"); stamps: (size, mtime_ns) of
    every file when it was listed. train: u1 [inner grid], 1 where statistics count.
    """

    root: Path
    grid: Grid
    layout: CubeLayout
    settings: tuple[RasterFeature, ...]
    features: tuple[Feature, ...]
    layers: dict[tuple[str, str], Layer]
    stamps: dict[str, tuple[int, int]]
    train: NDArray[np.uint8]
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    def __call__(self, chunk: int) -> Block:
        """Raises SourceError.

        A file that cannot be read or has changed, a value its kind does not allow.
        """
        seconds = dict.fromkeys(("read", "warp"), 0.0)
        layout = self.layout
        per, inner = layout.per_shard, layout.inner
        corner = np.array(np.unravel_index(chunk, layout.shard_grid)) * per
        counts = np.minimum(per, np.array(layout.inner_grid) - corner)
        t0, y0, x0 = (corner * inner).tolist()
        size = (counts * inner).tolist()
        # Rows and columns beyond the declared grid stay missing.
        rows, columns = min(size[1], self.grid.height - y0), min(size[2], self.grid.width - x0)
        data = np.full((*size, len(self.features)), np.nan, np.float32)
        dates = min(size[0], layout.shape[0] - t0)
        for date in range(dates):
            for at, plane in enumerate(self._planes(t0 + date, (y0, x0, rows, columns), seconds)):
                data[date, :rows, :columns, at] = plane
        train = self.train[
            corner[0] : corner[0] + counts[0],
            corner[1] : corner[1] + counts[1],
            corner[2] : corner[2] + counts[2],
        ]
        mask = (
            train.astype(bool)
            .repeat(inner[0], 0)[:dates]
            .repeat(inner[1], 1)[:, :rows]
            .repeat(inner[2], 2)[:, :, :columns]
        )
        facts = block_facts(data[:dates, :rows, :columns], mask, t0, self.features)
        valid = ~np.isnan(data)
        cut = (counts[0], inner[0], counts[1], inner[1], counts[2], inner[2], len(self.features))
        facts["valid_share"] = (
            valid.reshape(cut)
            .mean(axis=(1, 3, 5, 6), dtype=np.float64)
            .astype(np.float32)
            .reshape(-1)
            .tolist()
        )
        return Block(
            layout.present(chunk).tolist(),
            _inner_chunks(data.reshape(cut), valid.reshape(cut)),
            seconds,
            facts,
        )

    def _planes(
        self, date: int, window: tuple[int, int, int, int], seconds: dict[str, float]
    ) -> Iterator[Plane]:
        """Each feature's values of a date in a window of the grid, in the order of the features."""
        warped = self._warped(date, window, seconds)
        done: dict[str, Plane] = {}
        for spec, feature in zip(self.settings, self.features, strict=True):
            if spec.index is None:
                plane = warped[spec.name, ""]
            else:
                inputs = {
                    role: done[value] if isinstance(value, str) else warped[spec.name, role]
                    for role, value in spec.inputs.items()
                }
                plane = compute(spec, inputs)
            if (spec.name, "mask") in warped:
                plane = np.where(warped[spec.name, "mask"] > 0, plane, np.float32(np.nan))
            self._check_values(feature, plane, date)
            done[spec.name] = plane
            yield plane

    def _warped(
        self, date: int, window: tuple[int, int, int, int], seconds: dict[str, float]
    ) -> dict[tuple[str, str], Plane]:
        wanted: dict[Frame | None, list[tuple[str, str]]] = defaultdict(list)
        for key, layer in self.layers.items():
            wanted[layer.frame(date)].append(key)
        out: dict[tuple[str, str], Plane] = {}
        shape = (window[2], window[3])
        for frame, keys in wanted.items():
            planes = (
                self._read(frame, [self.layers[key] for key in keys], window, seconds)
                if frame
                else None
            )
            for at, key in enumerate(keys):
                out[key] = planes[at] if planes else np.full(shape, np.nan, np.float32)
        return out

    def _read(
        self, frame: Frame, layers: Sequence[Layer], window: Any, seconds: dict[str, float]
    ) -> list[Plane] | None:
        """The layers of one frame on the grid; None where the file does not reach."""
        start = time.perf_counter()
        self._check_unchanged(frame.path)
        source = open_raster(
            self.root / frame.path, self.root / frame.extent if frame.extent else None
        )
        part = source.grid.window_of(self.grid, window)
        if part is None:
            return None
        bands = sorted({layer.band for layer in layers}, key=str)
        raw = dict(zip(bands, source.read(frame.step, bands, part), strict=True))
        read = time.perf_counter()
        out, known = [], {}
        for layer in layers:
            if (
                layer.integers
                and layer.nodata is None
                and not source.declares_nan(layer.band)
                and np.isnan(raw[layer.band]).any()
            ):
                raise SourceError(
                    "NaN in a feature of integer codes",
                    where=self.root / frame.path,
                    remedy='declare nodata: "nan" if NaN means missing',
                )
            same = (layer.band, layer.method, layer.nodata)
            if same not in known:
                known[same] = warp(
                    missing_at(raw[layer.band], layer.nodata),
                    source.grid,
                    part,
                    self.grid,
                    window,
                    layer.method,
                )
            out.append(known[same])
        seconds["read"] += read - start
        seconds["warp"] += time.perf_counter() - read
        return out

    def _check_unchanged(self, path: str) -> None:
        if path in self._checked:
            return
        for name in self._files.get(path, [path]):
            try:
                info = (self.root / name).stat()
            except OSError as error:
                raise SourceError(
                    "a raster vanished during the build",
                    where=self.root / name,
                    found=error.strerror,
                    remedy="put it back and run the same command again",
                ) from None
            if name in self.stamps and (info.st_size, info.st_mtime_ns) != self.stamps[name]:
                raise SourceError(
                    "a raster changed during the build",
                    where=self.root / name,
                    remedy="run the same command again",
                )
        self._checked.add(path)

    def _check_values(self, feature: Feature, plane: Plane, date: int) -> None:
        if feature.kind == "continuous":
            return
        values = plane[~np.isnan(plane)]
        if feature.kind == "canopy":
            if values.size and values.min() < 0:
                raise SourceError(
                    "a canopy feature is negative",
                    where=self._where(feature.name, date),
                    expected="0 or more",
                    found=f"{values.min():g}",
                    remedy="declare its nodata, or make it continuous",
                )
            return
        stray = np.setdiff1d(values, self._codes[feature.name])
        if stray.size:
            raise SourceError(
                f"feature {feature.name!r} holds a code that is not declared",
                where=self._where(feature.name, date),
                expected=f"one of {list(feature.codes)}",
                found=f"{stray[0]:g}",
                remedy="add it to codes, or declare it as nodata",
            )

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """The files of each source that is a folder (Zarr)."""
        folders = {
            frame.path + "/"
            for layer in self.layers.values()
            for frame in layer.frames
            if frame and frame.path not in self.stamps
        }
        return {
            folder[:-1]: [name for name in self.stamps if name.startswith(folder)]
            for folder in folders
        }

    @cached_property
    def _codes(self) -> dict[str, Plane]:
        return {feature.name: np.array(feature.codes, np.float32) for feature in self.features}

    def _where(self, name: str, date: int) -> str:
        frames = [
            layer.frame(date) for (feature, _), layer in self.layers.items() if feature == name
        ]
        return (
            str(self.root / frames[0].path)
            if frames and frames[0]
            else f"feature {name}, date {date}"
        )


def _inner_chunks(
    data: NDArray[np.float32], valid: NDArray[np.bool_]
) -> Iterator[dict[str, NDArray[Any]]]:
    """data, valid: [nt, t, ny, y, nx, x, F] of a stored chunk, its inner chunks in C order."""
    for it, iy, ix in np.ndindex(data.shape[0], data.shape[2], data.shape[4]):
        yield {
            name: np.ascontiguousarray(each[it, :, iy, :, ix])
            for name, each in (("data", data), ("valid", valid))
        }


def warp(plane: Plane, source: Grid, part: Any, target: Grid, window: Any, method: str) -> Plane:
    """A window of a source on a window of the grid, NaN outside and where the pixel below a centre
    is missing.
    """
    from rasterio.warp import Resampling, reproject

    if source.transform == target.transform and source.crs == target.crs:
        row, column = window[0] - part[0], window[1] - part[1]
        if (
            row >= 0
            and column >= 0
            and row + window[2] <= part[2]
            and column + window[3] <= part[3]
        ):
            return plane[row : row + window[2], column : column + window[3]]
    out = np.full((window[2], window[3]), np.nan, np.float32)
    reproject(
        plane,
        out,
        src_transform=source.snapped(target).at(part),
        src_crs=source.crs,
        dst_transform=target.at(window),
        dst_crs=target.crs,
        src_nodata=np.nan,
        dst_nodata=np.nan,
        resampling=Resampling[method],
        tolerance=0.0,
    )
    return out


def compute(spec: RasterFeature, inputs: dict[str, Plane]) -> Plane:
    """An index of warped values; NaN where an input is, or where it is not defined.

    ndvi = (nir - red) / (nir + red) (Rouse 1974); ndwi = (green - nir) / (green + nir) (McFeeters
    1996); cover = 100 x clip((ndvi -
    0.2) / 0.6, 0, 1), a percentage; classes: the code of the interval between breaks a value lies
    in, lower edges included.
    """
    if spec.index == "classes":
        values = inputs["source"]
        codes = np.array(spec.codes, np.float32)[
            np.searchsorted(np.array(spec.breaks, np.float32), np.nan_to_num(values), side="right")
        ]
        return np.where(np.isnan(values), np.float32(np.nan), codes)
    high, low = (
        (inputs["green"], inputs["nir"]) if spec.index == "ndwi" else (inputs["nir"], inputs["red"])
    )
    total = high + low
    ratio = np.divide(high - low, total, out=np.full_like(total, np.nan), where=total != 0)
    return (
        np.clip((ratio - np.float32(0.2)) / np.float32(0.6), 0, 1) * np.float32(100)
        if spec.index == "cover"
        else ratio
    )
