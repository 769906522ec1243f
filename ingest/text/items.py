"""Items for text detection: a picture on its canvas, its polygons, and the maps of a DBNet.

`TextItems` is a map-style dataset. What it makes of a sample follows from files and settings alone,
so its items may be cached, and any number of processes may make them. Every polygon and the header
of every picture are checked when it is opened; pixels are decoded item by item. Coordinates are
(x, y), with corners of pixels at integers. Memory: one picture and its maps.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.box_cleaning import orient_boxes
from ingest.pictures.headers import Header
from ingest.pictures.images import MAX_FILE_BYTES, decode_rgb, decoder_versions, probe
from ingest.pictures.letterbox import Geometry, letterbox_into, plan_letterbox
from ingest.sources.files import read_inside
from ingest.sources.hashes import hash_files
from ingest.text.annotation_files import read_text_annotation
from ingest.text.maps import DBNET, TextMapSettings, draw_text_maps, fault_of
from ingest.text.records import TextPicture
from warehouse.errors import AnnotationError, ConfigError, SourceError

__all__ = ["TextItems"]

log = logging.getLogger(__name__)
REVISION = 1
"""Of what an item holds: raised with any change of it, so that kept items are made again."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """A picture after judging.

    Attributes
    ----------
    polygons
        float64 [n, 2] in pixels of the upright picture.
    ignore
        bool [polygons], those with a fault included.
    faults
        For each polygon, what is wrong with it, or None; None also for those annotated as ignored.
    """

    source: str
    header: Header
    polygons: tuple[NDArray[np.float64], ...]
    ignore: NDArray[np.bool_]
    text: tuple[str | None, ...]
    faults: tuple[str | None, ...]


@dataclass(frozen=True)
class TextItems:
    """Items of the pictures of an annotation, in its order.

    Parameters
    ----------
    folder
        Folder of the pictures.
    annotation
        MMOCR's JSON, or a folder of ICDAR 2015's `gt_<stem>.txt`. A relative path starts at
        `folder`.
    size
        (H, W) of the canvas, multiples of `maps.stride`.
    maps
        How the maps are drawn.
    resize_mode, pad_value
        As in `build_zarr`.
    faulty
        What happens to polygons without area, that intersect themselves, or that have no part in
        their picture. "error" raises AnnotationError. "ignore" keeps them with `ignore` true and
        masks them, one that intersects itself as its convex hull.
    max_pixels
        A picture that declares more is refused before it is decoded.

    Raises
    ------
    AnnotationError
        Naming file and entry, also for a picture that does not exist or has another size than
        declared.
    PictureError, SourceError, ConfigError
        For pictures that cannot be read, missing folders, and impossible settings.

    Notes
    -----
    An item is a dictionary:

    =================== ========================================================================
    image               uint8 [3, H, W], RGB, upright, with `pad_value` around it
    polygons            list of float32 [n, 2] in canvas pixels, as annotated, not clipped
    ignore              bool [polygons]
    too_small           bool [polygons], of those not ignored; see `ingest.text.maps.TextMaps`
    text                list of str, None where the format has none
    probability         float32 [H / stride, W / stride]
    probability_mask    bool, the same shape
    threshold           float32, the same shape
    threshold_mask      bool, the same shape
    inverse             float64 [3, 3]: (x, y, 1) of the canvas to pixels of the upright picture
    shape               (H, W) of the canvas
    raw_size            (height, width) of the upright picture
    orientation         EXIF, 1 to 8, as applied
    source              path of the picture below `folder`
    =================== ========================================================================
    """

    folder: Path
    annotation: Path
    size: tuple[int, int]
    maps: TextMapSettings = DBNET
    resize_mode: Literal["letterbox", "stretch"] = "letterbox"
    pad_value: int = 114
    faulty: Literal["error", "ignore"] = "error"
    max_pixels: int = 178_956_970
    samples: tuple[_Sample, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        side = self.maps.stride
        if len(self.size) != 2 or any(value < side or value % side for value in self.size):
            raise ConfigError(
                "a canvas for text maps",
                where="size",
                expected=f"(H, W), multiples of {side}",
                found=self.size,
            )
        for name, known in (
            ("faulty", ("error", "ignore")),
            ("resize_mode", ("letterbox", "stretch")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    "unknown setting of text items",
                    where=name,
                    expected=" or ".join(known),
                    found=getattr(self, name),
                )
        if not Path(self.folder).is_dir():
            raise SourceError("the folder of the pictures does not exist", where=self.folder)
        pictures = read_text_annotation(Path(self.folder), Path(self.folder) / self.annotation)
        # The class is frozen, since `version` and `fingerprint` must not change once they are used.
        object.__setattr__(self, "samples", tuple(self._judge(picture) for picture in pictures))
        found = Counter(
            fault for sample in self.samples for fault in sample.faults if fault is not None
        )
        log.info(
            "%d pictures, %d polygons, %d of them ignored%s",
            len(self),
            sum(len(sample.polygons) for sample in self.samples),
            sum(int(sample.ignore.sum()) for sample in self.samples),
            "".join(f", {count} {name}" for name, count in sorted(found.items())),
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Make the item of a picture.

        Raises
        ------
        PictureError
            If the picture cannot be decoded.
        SourceError
            If the file is gone, or has another size than when it was opened.
        """
        sample = self.samples[index]
        data = read_inside(Path(self.folder), sample.source, limit=MAX_FILE_BYTES)
        picture, orientation = decode_rgb(data, name=sample.source, max_pixels=self.max_pixels)
        height, width = picture.shape[:2]
        # The polygons were judged against the size in the header.
        if (width, height) != (sample.header.width, sample.header.height):
            raise SourceError(
                "a source file changed since it was opened",
                where=sample.source,
                expected=f"{sample.header.width} x {sample.header.height}",
                found=f"{width} x {height}",
            )
        geometry = plan_letterbox(width, height, self.size, self.resize_mode)
        image = np.empty((3, *self.size), np.uint8)
        letterbox_into(picture, geometry, image, self.pad_value)
        polygons = [_onto_canvas(polygon, geometry) for polygon in sample.polygons]
        left, top = geometry.pad_x, geometry.pad_y
        drawn = draw_text_maps(
            polygons,
            sample.ignore.tolist(),
            self.size,
            settings=self.maps,
            within_xyxy=(left, top, left + geometry.new_width, top + geometry.new_height),
        )
        return {
            "image": image,
            "polygons": [polygon.astype(np.float32) for polygon in polygons],
            "ignore": sample.ignore.copy(),
            "too_small": drawn.too_small,
            "text": list(sample.text),
            "probability": drawn.probability,
            "probability_mask": drawn.probability_mask,
            "threshold": drawn.threshold,
            "threshold_mask": drawn.threshold_mask,
            "inverse": _inverse(geometry),
            "shape": self.size,
            "raw_size": (height, width),
            "orientation": orientation,
            "source": sample.source,
        }

    @cached_property
    def version(self) -> str:
        """Return the SHA-256 of the annotation as judged and of every picture's bytes."""
        files = [Path(self.folder) / sample.source for sample in self.samples]
        digest = hashlib.sha256()
        for sample, content in zip(
            self.samples, hash_files([(path, path.stat()) for path in files]), strict=True
        ):
            digest.update(
                repr((sample.source, content, sample.ignore.tolist(), sample.text)).encode()
            )
            for polygon in sample.polygons:
                digest.update(repr(polygon.tolist()).encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Return what decides the content of an item beside its files.

        These are the settings, and the versions of what decodes, resizes and clips. A cache of
        items is keyed by it.
        """
        from importlib.metadata import version

        versions = decoder_versions() | {"shapely": version("shapely")}
        what = (REVISION, self.size, asdict(self.maps), self.resize_mode, self.pad_value, versions)
        return f"{type(self).__module__}.{type(self).__qualname__}{what}"

    def _judge(self, picture: TextPicture) -> _Sample:
        where = picture.annotation
        if not _is_file(Path(self.folder), picture.source):
            raise AnnotationError(
                "an annotation has no picture",
                where=where,
                expected=Path(self.folder) / picture.source,
                found="no such file",
                remedy="restore the picture or take its entry out",
            )
        header = probe(Path(self.folder), picture.source, max_pixels=self.max_pixels)
        size, stored = (header.width, header.height), (header.raw_width, header.raw_height)
        if picture.declared_size not in (None, size, stored):
            raise AnnotationError(
                "a picture is of another size than declared",
                where=where,
                expected="{} x {}".format(*picture.declared_size),
                found="{} x {}".format(*size),
                remedy="restore the picture that was annotated",
            )
        # The annotation tool did not apply EXIF; `ingest.pictures.judge`
        # treats boxes in the same way.
        turn = picture.declared_size == stored and stored != size
        polygons = tuple(
            _upright(region.polygon, header) if turn else region.polygon
            for region in picture.regions
        )
        faults = tuple(
            None if region.ignore else fault_of(polygon, size)
            for region, polygon in zip(picture.regions, polygons, strict=True)
        )
        for at, fault in enumerate(faults):
            if fault is not None and self.faulty == "error":
                raise AnnotationError(
                    f"a polygon is of no use: {fault}",
                    where=f"{where}, polygon {at}",
                    expected=f"a simple polygon in a picture of {size[0]} x {size[1]}",
                    found=" ".join(f"{x:g},{y:g}" for x, y in polygons[at])[:200],
                    remedy='mend it, or open with faulty="ignore" to mask such polygons',
                )
        ignore = np.array(
            [
                region.ignore or fault is not None
                for region, fault in zip(picture.regions, faults, strict=True)
            ],
            np.bool_,
        )
        return _Sample(
            picture.source,
            header,
            polygons,
            ignore,
            tuple(region.text for region in picture.regions),
            faults,
        )


def _is_file(folder: Path, source: str) -> bool:
    """Whether reading can be tried."""
    # A path with a NUL byte raises ValueError here, whereas reading refuses it by name.
    return "\0" in source or (folder / source).is_file()


def _upright(polygon: NDArray[np.float64], header: Header) -> NDArray[np.float64]:
    both = np.concatenate([polygon, polygon], axis=1)
    return orient_boxes(both, header.raw_width, header.raw_height, header.orientation)[:, :2]


def _onto_canvas(polygon: NDArray[np.float64], geometry: Geometry) -> NDArray[np.float64]:
    return polygon * (geometry.scale_x, geometry.scale_y) + (geometry.pad_x, geometry.pad_y)


def _inverse(geometry: Geometry) -> NDArray[np.float64]:
    sx, sy = geometry.scale_x, geometry.scale_y
    return np.array(
        [[1 / sx, 0, -geometry.pad_x / sx], [0, 1 / sy, -geometry.pad_y / sy], [0, 0, 1]],
        np.float64,
    )
