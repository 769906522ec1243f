"""What a feature of a cube reads from files: at most one frame a date."""

from __future__ import annotations

from dataclasses import dataclass

from ingest.rasters.settings import Resampling

__all__ = ["Frame", "Layer", "LayerKey"]

LayerKey = tuple[str, str]
"""Name of a feature and role: "" for the feature itself, the input of an index, or `mask`."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One date of one file.

    Attributes
    ----------
    path
        POSIX path relative to the input root.
    step
        Position along the file's own time axis; None where it has none.
    extent
        Path of the GeoJSON rectangle that a .npy covers; None for other files.
    """

    path: str
    step: int | None = None
    extent: str | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """What is read for a feature, or for one input of an index.

    Attributes
    ----------
    frames
        For each date the frame that is read, None where there is none; a single frame where the
        layer is static.
    band
        Number of the band, from 1, or its name.
    method
        The resampling.
    nodata
        Value that marks missing data, in addition to what the file declares.
    static
        Whether the layer is the same for all dates.
    integers
        Whether the values are codes, among which an undeclared NaN would be a mistake.
    """

    # Frames are named, not opened: layers are pickled for the worker processes.
    frames: tuple[Frame | None, ...]
    band: int | str
    method: Resampling
    nodata: float | None = None
    static: bool = False
    integers: bool = False

    def frame(self, date: int) -> Frame | None:
        """Return the frame of a date, which is given by its index; None where there is none."""
        return self.frames[0 if self.static else date]
