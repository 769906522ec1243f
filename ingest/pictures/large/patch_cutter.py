"""Large pictures and their masks, listed and judged, then cut into patches.

A picture with a mask is a `Parent` of a split; one without is predicted only. Whoever cuts has the
boxes: nothing here knows how patches lie. Parents are kept open one at a time, in the order patches
come, so that a parent is decoded once for all its patches in a row. Memory: one decoded picture and
its mask, or GDAL's block cache (`ingest.pictures.large.windows`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ingest.pictures.images import MAX_FILE_BYTES, decoder_versions
from ingest.pictures.large.windows import Box, Look, Windows, look, open_windows
from ingest.pictures.mask_decoding import classes_of, decode_mask
from ingest.records.base import Rejection
from ingest.records.list_sources import list_sources
from ingest.records.masks import parse_masks
from ingest.sources.files import read_inside
from ingest.sources.listing import SourceListing
from ingest.sources.pairing import is_mask
from ingest.sources.splits import assign_splits
from warehouse.errors import PictureError, SourceError, ThresholdError, WarehouseError
from warehouse.settings import MASK_PADDING, BuildSettings

__all__ = ["PREDICT", "Parent", "PatchCutter", "Survey", "cut_versions", "list_pictures", "survey"]

PREDICT = "predict"
"""The split of pictures without a mask."""
REMEDIES = {
    "smaller_than_patch": "lower --segment.patch_size",
    "mask_values": 'declare them with --segment.mask_values \'{"0": 0, "255": 1}\'',
    "too_large": "raise --segment.max_pixels",
}
"""Of refusals that a setting would mend."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True, slots=True)
class Parent:
    """A large picture. split: train, val, test or PREDICT; width, height in pixels; mask.

    Relative path or None; looks: of both files.
    """

    source: str
    split: str
    group: str
    sha256: str
    width: int
    height: int
    grey: bool
    picture_look: Look
    mask: str | None = None
    mask_sha256: str | None = None
    mask_look: Look | None = None


@dataclass(frozen=True)
class Survey:
    """What there is to cut, sorted by path, and what is refused. found = parents + refused
    pictures.
    """

    parents: tuple[Parent, ...]
    rejected: tuple[Rejection, ...]
    found: int
    warnings: tuple[str, ...] = ()

    @property
    def grey(self) -> bool:
        """Whether every picture has one channel."""
        return all(parent.grey for parent in self.parents)


def cut_versions() -> dict[str, str]:
    """Name -> version of what decodes pictures and cuts them."""
    from importlib.metadata import version

    return decoder_versions() | {"rasterio": version("rasterio")}


def list_pictures(settings: BuildSettings) -> SourceListing:
    """Every picture below `input_root`; masks are told from pictures by name (`ingest.sources.pairing`).

    Raises SourceError, ConfigError.
    """
    try:
        listing = list_sources(settings.model_copy(update={"format": "folder"}))
    except WarehouseError as error:
        # The listing is the build's and speaks of its settings.
        remedy = error.remedy and error.remedy.replace("--build.input_root", "--segment.input_root")
        raise type(error)(
            error.what, where=error.where, expected=error.expected, found=error.found, remedy=remedy
        ) from None
    pictures = tuple(path for path in listing.pictures if not is_mask(path))
    if not pictures:
        raise SourceError(
            "masks and no pictures",
            where=listing.root,
            expected="pictures beside them, or in a folder `images`",
            found=f"{len(listing.pictures)} masks",
            remedy="point --segment.input_root at the folder of both",
        )
    masks = tuple(path for path in listing.pictures if is_mask(path))
    return replace(listing, format="masks", pictures=pictures, annotations=masks)


def survey(
    listing: SourceListing,
    settings: BuildSettings,
    *,
    least: int,
    unreadable: Mapping[str, PictureError],
) -> Survey:
    """Read every header, pair masks, assign splits by parent. least: the shortest side a picture
    may have, the patch's.

    unreadable: pictures that failed while being cut. More than `settings.max_invalid` refused ones
    raise ThresholdError naming the first.
    """
    parsed = parse_masks(listing)
    mask_of = {raw.source: raw.mask for raw in parsed.pictures}
    rejected = [line for line in parsed.rejected if line.reason != "no_mask"]
    refused = {line.path for line in rejected if line.kind == "picture"}
    orphans = sorted(line.path for line in rejected if line.reason == "missing_picture")
    parents: list[Parent] = []
    for source in listing.pictures:
        if source in refused:
            continue
        try:
            if source in unreadable:
                raise unreadable[source]
            parents.append(_judge(source, mask_of.get(source), listing, settings, least))
        except PictureError as error:
            detail = (
                f"expected {error.expected}, found {error.found}"
                if error.expected is not None
                else str(error.found or "")
            )
            rejected.append(Rejection(source, "picture", error.reason, detail))
    invalid = [line for line in rejected if line.kind == "picture"]
    if len(invalid) > settings.max_invalid or not parents:
        shown = ", ".join(
            f"{line.path} ({line.reason}: {line.detail[:160]})" for line in invalid[:3]
        )
        reasons = {line.reason for line in invalid}
        mend = ", or ".join(
            [
                *(text for reason, text in REMEDIES.items() if reason in reasons),
                "mend or remove them",
            ]
        )
        raise ThresholdError(
            "pictures cannot be used",
            where=shown or listing.root,
            expected=f"at most {settings.max_invalid}",
            found=f"{len(invalid)} of {len(listing.pictures)}",
            remedy=f"{mend}, or leave them out with --segment.max_invalid {len(invalid)}",
        )
    known = [parent for parent in parents if parent.mask is not None]
    warnings: tuple[str, ...] = ()
    if known:
        places = assign_splits(
            [parent.source for parent in known], [parent.sha256 for parent in known], settings
        )
        chosen = {
            parent.source: (split, group)
            for parent, split, group in zip(known, places.splits, places.groups, strict=True)
        }
        parents = [
            replace(parent, split=chosen[parent.source][0], group=chosen[parent.source][1])
            if parent.mask is not None
            else parent
            for parent in parents
        ]
        warnings = tuple(places.warnings)
    if orphans:
        # Not an error: but a misspelt name would turn a picture to learn from into one that is only
        # predicted.
        warnings += (f"{len(orphans)} masks have no picture of their name, such as {orphans[0]}",)
    order = sorted(rejected, key=lambda line: (line.path, line.kind, line.reason))
    return Survey(tuple(parents), tuple(order), len(listing.pictures), warnings)


def _judge(
    source: str, mask: str | None, listing: SourceListing, settings: BuildSettings, least: int
) -> Parent:
    found = look(listing.root, source, max_pixels=settings.max_pixels)
    size = (found.width, found.height)
    if min(size) < least:
        raise PictureError(
            "smaller_than_patch",
            where=source,
            expected=f"sides of at least {least} pixels",
            found=f"{size[0]} x {size[1]}",
            remedy="lower --segment.patch_size",
        )
    mask_look = None
    if mask is not None:
        try:
            mask_look = look(listing.root, mask, max_pixels=settings.max_pixels)
        except PictureError as error:
            raise PictureError("mask_unreadable", where=source, found=str(error)) from None
        if (mask_look.width, mask_look.height) != size:
            raise PictureError(
                "mask_size",
                where=source,
                expected=f"{size[0]} x {size[1]}",
                found=f"{mask} with {mask_look.width} x {mask_look.height}",
            )
    mask_sha256 = None if mask is None else listing.sha256_of(mask)
    return Parent(
        source,
        PREDICT,
        source,
        listing.sha256_of(source),
        *size,
        found.grey,
        found,
        mask,
        mask_sha256,
        mask_look,
    )


@dataclass
class PatchCutter:
    """`load` of the builder: (parent, box) -> that patch's `image` uint8 [channels, h, w] and
    `mask` uint8 [h, w].

    channels: 1 or 3; a colour picture as one channel is its luma (ITU-R BT.601), a grey one as
    three is repeated. mask: classes, MASK_PADDING where there is no mask. Raises PictureError
    naming the parent.
    """

    root: Path
    channels: int
    mask_values: dict[int, int]
    max_pixels: int
    decoded: int = 0
    _held: threading.local = field(default_factory=threading.local)

    def __call__(
        self, payload: tuple[Parent, Box]
    ) -> tuple[dict[str, NDArray[np.uint8]], dict[str, float]]:
        parent, box = payload
        start = time.perf_counter()
        picture, mask = self._open(parent)
        opened = time.perf_counter()
        found = picture.read(box)
        image = self._channels(found)
        if mask is None:
            classes = np.full(found.shape[:2], MASK_PADDING, np.uint8)
        else:
            assert parent.mask is not None
            classes = classes_of(mask.read(box), self.mask_values, parent.source, parent.mask)
        return {"image": image, "mask": classes}, {
            "decode": opened - start,
            "read": time.perf_counter() - opened,
        }

    def _channels(self, found: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if found.ndim == 2:
            return np.repeat(found[None], self.channels, axis=0)
        if self.channels == 3:
            return np.ascontiguousarray(np.moveaxis(found, 2, 0))
        return (found @ LUMA + np.float32(0.5)).astype(np.uint8)[None]

    def _open(self, parent: Parent) -> tuple[Windows, Windows | None]:
        if getattr(self._held, "source", None) != parent.source:
            self._close()
            self.decoded += 1
            picture = open_windows(
                self.root,
                parent.source,
                parent.picture_look,
                sha256=parent.sha256,
                max_pixels=self.max_pixels,
            )
            self._held.source, self._held.pair = parent.source, (picture, self._open_mask(parent))
        pair: tuple[Windows, Windows | None] = self._held.pair
        return pair

    def _open_mask(self, parent: Parent) -> Windows | None:
        if parent.mask is None:
            return None
        assert parent.mask_look is not None
        assert parent.mask_sha256 is not None
        if parent.mask_look.windows and parent.mask_look.grey:
            found = open_windows(
                self.root,
                parent.mask,
                parent.mask_look,
                sha256=parent.mask_sha256,
                max_pixels=self.max_pixels,
            )
            if found.dataset.dtypes[0] != "uint8":
                raise PictureError(
                    "mask_unreadable",
                    where=parent.source,
                    expected=f"8 bits in {parent.mask}",
                    found=found.dataset.dtypes[0],
                )
            return found
        data = read_inside(self.root, parent.mask, limit=MAX_FILE_BYTES, sha256=parent.mask_sha256)
        values = decode_mask(
            data, parent.source, parent.mask, (parent.width, parent.height), self.max_pixels
        )
        # Of a mask held whole every value is looked at, also where the first patch does not reach.
        classes_of(values, self.mask_values, parent.source, parent.mask)
        return Windows(parent.mask, parent.width, parent.height, pixels=values)

    def _close(self) -> None:
        for windows in getattr(self._held, "pair", ()):
            if windows is not None:
                windows.close()
        self._held.source = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _held=threading.local())
