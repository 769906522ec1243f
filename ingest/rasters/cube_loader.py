"""From planned layers to one stored chunk of a cube: read, warp, compute indices, check values.

Of every file each window is read once, all its bands together. Indices are computed from warped
values. Memory: one stored chunk as float32 and its validity, and the windows of one file.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.grids import Grid, Window
from ingest.rasters.indices import compute
from ingest.rasters.readers.opening import open_raster
from ingest.rasters.readers.source import RasterSource, missing_at
from ingest.rasters.resample import Plane, warp
from ingest.rasters.settings import RasterFeature
from ingest.rasters.source_layers import Frame, Layer, LayerKey
from warehouse.errors import SourceError
from warehouse.layouts.cube.feature_stats import block_facts
from warehouse.layouts.cube.geometry import CubeChunking
from warehouse.layouts.features import Feature
from warehouse.layouts.plan import Block

__all__ = ["CubeLoader"]


@dataclass(frozen=True)
class CubeLoader:
    """The callable of a cube's build that turns the number of a stored chunk into its inner chunks.

    It is pickled for the worker processes, and opens files there.

    Attributes
    ----------
    root
        The input root.
    grid
        The grid of the cube, as declared.
    layout
        How the cube is divided into stored and inner chunks.
    settings, features
        The features as declared and as stored, in the same order.
    layers
        What is read for each feature and role.
    stamps
        Size and time of modification in nanoseconds of every file, as listed.
    train
        uint8 [inner chunks along time, y, x]: 1 where voxels count in statistics.
    """

    root: Path
    grid: Grid
    layout: CubeChunking
    settings: tuple[RasterFeature, ...]
    features: tuple[Feature, ...]
    layers: Mapping[LayerKey, Layer]
    stamps: Mapping[str, tuple[int, int]]
    train: NDArray[np.uint8]
    _checked: set[str] = field(default_factory=set, compare=False, repr=False)

    def __call__(self, chunk: int) -> Block:
        """Make a stored chunk.

        Raises
        ------
        SourceError
            For a file that cannot be read or has changed, and for a value that its kind of feature
            does not allow.
        """
        seconds = dict.fromkeys(("read", "warp"), 0.0)
        layout, features = self.layout, len(self.features)
        per, inner = layout.per_shard, layout.inner
        # Of the stored chunk: its first inner chunk, and how many it has along each axis.
        corner = np.array(np.unravel_index(chunk, layout.shard_grid)) * per
        counts = np.minimum(per, np.array(layout.inner_grid) - corner)
        t0, y0, x0 = (corner * inner).tolist()
        size = (counts * inner).tolist()

        # Rows and columns beyond the declared grid, and dates beyond the last, stay missing.
        dates = min(size[0], layout.shape[0] - t0)
        rows, columns = min(size[1], self.grid.height - y0), min(size[2], self.grid.width - x0)

        # One date at a time: of the files only the windows of a single date are in memory.
        data = np.full((*size, features), np.nan, np.float32)
        for date in range(dates):
            planes = self._planes(t0 + date, (y0, x0, rows, columns), seconds)
            for at, plane in enumerate(planes):
                data[date, :rows, :columns, at] = plane

        present = data[:dates, :rows, :columns]
        train = self._train_mask(corner, counts)[:dates, :rows, :columns]
        facts = block_facts(present, train, t0, self.features)

        # Seven axes, in which each inner chunk is a view: nothing is copied but what is stored.
        divided = (counts[0], inner[0], counts[1], inner[1], counts[2], inner[2], features)
        chunks, valid = data.reshape(divided), ~np.isnan(data).reshape(divided)
        shares = valid.mean(axis=(1, 3, 5, 6), dtype=np.float64).astype(np.float32)
        facts["valid_share"] = shares.reshape(-1).tolist()
        positions = layout.present(chunk).tolist()
        return Block(positions, _inner_chunks(chunks, valid), seconds, facts)

    def _train_mask(
        self, corner: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Return bool [time, y, x] of a stored chunk's voxels: whether statistics count them."""
        t, y, x = (slice(start, start + count) for start, count in zip(corner, counts, strict=True))
        inner = self.layout.inner
        train = self.train[t, y, x].astype(bool)
        return train.repeat(inner[0], 0).repeat(inner[1], 1).repeat(inner[2], 2)

    def _planes(self, date: int, window: Window, seconds: dict[str, float]) -> Iterator[Plane]:
        """Yield each feature's values of a date in a window of the grid, in order of features."""
        warped = self._warped(date, window, seconds)
        # An index may name features before it as its inputs.
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
        self, date: int, window: Window, seconds: dict[str, float]
    ) -> dict[LayerKey, Plane]:
        """Return every layer of a date on the grid, all missing where there is no frame."""
        # Layers of one file together, so that the file is read once for all its bands.
        keys_of: dict[Frame | None, list[LayerKey]] = defaultdict(list)
        for key, layer in self.layers.items():
            keys_of[layer.frame(date)].append(key)
        out: dict[LayerKey, Plane] = {}
        for frame, keys in keys_of.items():
            layers = [self.layers[key] for key in keys]
            planes = None if frame is None else self._read(frame, layers, window, seconds)
            if planes is None:
                planes = [np.full(window[2:], np.nan, np.float32) for _ in keys]
            out.update(zip(keys, planes, strict=True))
        return out

    def _read(
        self, frame: Frame, layers: Sequence[Layer], window: Window, seconds: dict[str, float]
    ) -> list[Plane] | None:
        """Return the layers of one frame on the grid; None where the file does not reach."""
        start = time.perf_counter()
        self._check_unchanged(frame.path)
        extent = self.root / frame.extent if frame.extent else None
        source = open_raster(self.root / frame.path, extent)
        part = source.grid.window_of(self.grid, window)
        if part is None:
            return None

        bands = sorted({layer.band for layer in layers}, key=str)
        raw = dict(zip(bands, source.read(frame.step, bands, part), strict=True))
        read = time.perf_counter()

        out = []
        # Several indices may need the same band, which is then warped once.
        known: dict[tuple[int | str, str, float | None], Plane] = {}
        for layer in layers:
            values = raw[layer.band]
            self._refuse_undeclared_nan(frame, layer, source, values)
            request = (layer.band, layer.method, layer.nodata)
            if request not in known:
                plane = missing_at(values, layer.nodata)
                known[request] = warp(plane, source.grid, part, self.grid, window, layer.method)
            out.append(known[request])
        seconds["read"] += read - start
        seconds["warp"] += time.perf_counter() - read
        return out

    def _refuse_undeclared_nan(
        self, frame: Frame, layer: Layer, source: RasterSource, values: Plane
    ) -> None:
        # NaN among codes may mean missing values or a conversion that failed: only the user knows.
        if not layer.integers or layer.nodata is not None or source.declares_nan(layer.band):
            return
        if np.isnan(values).any():
            raise SourceError(
                "NaN in a feature of integer codes",
                where=self.root / frame.path,
                remedy='declare nodata: "nan" if NaN means missing',
            )

    def _check_unchanged(self, path: str) -> None:
        """Raise SourceError if a file is no longer what was hashed.

        Each process looks once, when it first reads the file.
        """
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
        undeclared = np.setdiff1d(values, self._codes[feature.name])
        if undeclared.size:
            raise SourceError(
                f"feature {feature.name!r} holds a code that is not declared",
                where=self._where(feature.name, date),
                expected=f"one of {list(feature.codes)}",
                found=f"{undeclared[0]:g}",
                remedy="add it to codes, or declare it as nodata",
            )

    @cached_property
    def _files(self) -> dict[str, list[str]]:
        """The files of each source that is a folder, as Zarr stores are."""
        folders = {
            frame.path
            for layer in self.layers.values()
            for frame in layer.frames
            if frame and frame.path not in self.stamps
        }
        return {
            folder: [name for name in self.stamps if name.startswith(f"{folder}/")]
            for folder in folders
        }

    @cached_property
    def _codes(self) -> dict[str, Plane]:
        return {feature.name: np.array(feature.codes, np.float32) for feature in self.features}

    def _where(self, name: str, date: int) -> str:
        """Return the file that a feature's values of a date come from, for messages."""
        frames = [
            layer.frame(date) for (feature, _), layer in self.layers.items() if feature == name
        ]
        if frames and frames[0]:
            return str(self.root / frames[0].path)
        return f"feature {name}, date {date}"


def _inner_chunks(
    data: NDArray[np.float32], valid: NDArray[np.bool_]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the inner chunks of a stored chunk in C order.

    Parameters
    ----------
    data, valid
        [nt, t, ny, y, nx, x, features]: n inner chunks along each axis.
    """
    for it, iy, ix in np.ndindex(data.shape[0], data.shape[2], data.shape[4]):
        yield {
            "data": np.ascontiguousarray(data[it, :, iy, :, ix]),
            "valid": np.ascontiguousarray(valid[it, :, iy, :, ix]),
        }
