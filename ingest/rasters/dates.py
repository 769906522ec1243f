"""Which file shows which date: dates of files and time axes, and the layers made of them.

Every source says its date in its name, in its own time axis, or in a side file. Dates are instants
in UTC with a resolution of one second. Duplicate and unsorted dates are refused here, because later
nothing could tell them from a fault of the data.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ingest.rasters.raster_listing import matching_files
from ingest.rasters.readers.opening import open_raster
from ingest.rasters.readers.source import RasterSource
from ingest.rasters.settings import RasterFeature, RasterSettings
from ingest.rasters.source_layers import Frame, Layer, LayerKey
from warehouse.errors import SourceError

__all__ = ["DatedFrame", "Times", "dated_frames", "make_layers"]

Times = NDArray[np.datetime64]
DatedFrame = tuple[Frame, np.datetime64 | None]
"""A frame and its date, None for a static feature."""
EPOCH = np.datetime64("1970-01-01", "s")


def dated_frames(
    root: Path, feature: RasterFeature, raster: RasterSettings, pattern: str | None
) -> list[DatedFrame]:
    """Return every step of every file that a pattern matches, with its date.

    Parameters
    ----------
    root
        The input root.
    pattern
        The files of the feature or of its mask; None means none.

    Raises
    ------
    SourceError
        For a file without a date, dates that are not sorted, two sources of one date, or a static
        feature with more than one file.
    """
    if pattern is None:
        return []

    # The bands of an index belong to the feature's own files; a mask has only its first band read.
    bands: list[int | str] = _bands(feature) if pattern == feature.files else [1]
    found: list[DatedFrame] = []
    for path in matching_files(root, pattern):
        found += _frames_of_file(root, path, bands, feature, raster)

    # Nothing says which of two files a feature without dates would show.
    if feature.static and len(found) > 1:
        raise SourceError(
            "a static feature has more than one file",
            where=root / pattern,
            found=f"{len(found)} files",
            remedy="narrow its files to one, or leave static away",
        )
    if not feature.static:
        _refuse_duplicates(root, feature, found)
    return found


def _bands(feature: RasterFeature) -> list[int | str]:
    if feature.index is None:
        return [feature.band]
    return [value for value in feature.inputs.values() if isinstance(value, int)]


def _frames_of_file(
    root: Path,
    path: str,
    bands: Sequence[int | str],
    feature: RasterFeature,
    raster: RasterSettings,
) -> list[DatedFrame]:
    extent = (feature.extent or raster.grid.geojson) if path.endswith(".npy") else None
    source = open_raster(root / path, root / extent if extent else None)
    for band in bands:
        source.check(band)

    if feature.static:
        return [(Frame(path, None if source.steps is None else 0, extent), None)]
    if source.steps is None:
        return [(Frame(path, None, extent), _date_in_name(root, path, raster))]
    times = _times_of(root, path, source, source.steps, raster)
    return [(Frame(path, step, extent), time) for step, time in enumerate(times)]


def _times_of(
    root: Path, path: str, source: RasterSource, steps: int, raster: RasterSettings
) -> Times:
    # The dates in the file itself win: the one side file of a cube may be about other sources.
    if source.times is not None:
        _check_sorted(source.times, root / path)
        return source.times
    times = _times_in_file(root, raster, steps, path)
    _check_sorted(times, root / str(raster.time.file))
    return times


def _refuse_duplicates(root: Path, feature: RasterFeature, found: Sequence[DatedFrame]) -> None:
    seen: dict[np.datetime64 | None, Frame] = {}
    for frame, time in found:
        if time in seen:
            raise SourceError(
                f"two sources of feature {feature.name!r} have the date {time}",
                where=root / frame.path,
                found=f"also {seen[time].path}",
                remedy="keep one of them, or let raster.time.pattern tell them apart",
            )
        seen[time] = frame


def _date_in_name(root: Path, path: str, raster: RasterSettings) -> np.datetime64:
    match = re.search(raster.time.pattern, Path(path).name)
    try:
        # A name without a date and a date that does not parse are one fault to the user.
        if match is None:
            raise ValueError(f"the name does not match {raster.time.pattern}")
        return _instant(dt.datetime.strptime(match["date"], raster.time.format))
    except ValueError as error:
        raise SourceError(
            "a raster's name holds no date",
            where=root / path,
            found=str(error),
            remedy="correct raster.time.pattern and format, or make the feature static",
        ) from None


def _instant(time: dt.datetime) -> np.datetime64:
    """Convert to UTC; a time without an offset is taken to be in UTC already."""
    if time.tzinfo is not None:
        time = time.astimezone(dt.UTC).replace(tzinfo=None)
    return np.datetime64(time, "s")


def _times_in_file(root: Path, raster: RasterSettings, steps: int, path: str) -> Times:
    if raster.time.file is None:
        raise SourceError(
            "a source with many dates does not say which",
            where=root / path,
            remedy="give raster.time.file, a JSON list of dates",
        )
    where = root / raster.time.file
    try:
        texts = json.loads(where.read_bytes())
        times = np.array([_instant(dt.datetime.fromisoformat(text)) for text in texts])
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(
            "the file of dates does not parse",
            where=where,
            found=str(error)[:120],
            remedy="make it a JSON list of ISO dates",
        ) from None
    if len(times) != steps:
        raise SourceError(
            "dates and source disagree",
            where=where,
            expected=f"{steps} dates as in {path}",
            found=len(times),
            remedy="give one date a step",
        )
    return times


def _check_sorted(times: Times, where: Path) -> None:
    """Raise SourceError unless every step has a date and each is later than the one before."""
    # NaT compares as neither smaller nor equal, so it would pass the checks below.
    missing = np.isnat(times)
    if missing.any():
        raise SourceError(
            "a date is missing",
            where=where,
            found=f"none at step {int(np.argmax(missing))}",
            remedy="give every step its date",
        )
    steps = np.diff(times)
    repeated, reversed_ = steps == np.timedelta64(0, "s"), steps < np.timedelta64(0, "s")
    if repeated.any():
        raise SourceError(
            "a date stands twice",
            where=where,
            found=str(times[int(np.argmax(repeated))]),
            remedy="leave one of the two steps out",
        )
    if reversed_.any():
        late = times[int(np.argmax(reversed_)) + 1]
        raise SourceError(
            "time is not sorted",
            where=where,
            found=f"{late} comes too late",
            remedy="sort the steps by date",
        )


def make_layers(
    root: Path, raster: RasterSettings, frames: Mapping[str, Sequence[DatedFrame]]
) -> tuple[Times, dict[LayerKey, Layer]]:
    """Line up the frames of all features along common dates.

    Parameters
    ----------
    frames
        What `dated_frames` found for each feature.

    Returns
    -------
    tuple
        The dates of all features, sorted, and what is read for each feature and role. A cube of
        static features only has the single date 1970-01-01.
    """
    dates = {time for found in frames.values() for _, time in found if time is not None}
    # The time axis needs at least one step.
    times = np.array(sorted(dates), "datetime64[s]") if dates else np.array([EPOCH])

    layers: dict[LayerKey, Layer] = {}
    for feature in raster.features:
        nodata = None if feature.nodata is None else float(feature.nodata)
        for role, band in _roles(feature).items():
            layers[feature.name, role] = Layer(
                _by_date(frames[feature.name], times, feature.static),
                band,
                feature.method,
                nodata,
                static=feature.static,
                integers=feature.kind == "categorical",
            )
        if feature.mask:
            masks = dated_frames(root, feature, raster, feature.mask)
            # Dates of masks do not join the axis: a mask alone has nothing to show.
            by_date = _by_date(masks, times, feature.static)
            # Nearest, since a mask that is averaged would have values between its two.
            layers[feature.name, "mask"] = Layer(by_date, 1, "nearest", static=feature.static)
    return times, layers


def _roles(feature: RasterFeature) -> dict[str, int | str]:
    """Return the bands that are read for a feature, by role."""
    if feature.index is None:
        return {"": feature.band}
    return {role: band for role, band in feature.inputs.items() if isinstance(band, int)}


def _by_date(frames: Sequence[DatedFrame], times: Times, static: bool) -> tuple[Frame | None, ...]:
    # One frame for all dates, which `Layer.frame` repeats: a cube may have thousands of dates.
    if static:
        return (frames[0][0],)
    known = {time: frame for frame, time in frames}
    return tuple(known.get(time) for time in times)
