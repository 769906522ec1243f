"""Large pictures and their masks: listed, judged, and assigned to splits.

A picture with a mask is a `Parent` of a split; one without a mask is only predicted. A mask is told
from a picture by its name (`ingest.sources.pairing`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ingest.pictures.large.windows import PictureHeader, read_window_header
from ingest.records.base import Rejection
from ingest.records.list_sources import list_sources
from ingest.records.masks import parse_masks
from ingest.sources.listing import SourceListing
from ingest.sources.pairing import is_mask
from ingest.sources.splits import assign_splits
from warehouse.errors import PictureError, SourceError, ThresholdError, WarehouseError
from warehouse.settings import BuildSettings

__all__ = ["PREDICT", "Parent", "Survey", "list_pictures", "survey"]

PREDICT = "predict"
"""The split of pictures without a mask."""
REMEDIES = {
    "smaller_than_patch": "lower --segment.patch_size",
    "mask_values": 'declare them with --segment.mask_values \'{"0": 0, "255": 1}\'',
    "too_large": "raise --segment.max_pixels",
}
"""Of refusals that a setting would mend, by reason."""
MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Parent:
    """A large picture.

    Attributes
    ----------
    source
        POSIX path relative to the input root.
    split
        `train`, `val`, `test` or PREDICT.
    group
        Key of the group; pictures of one group are in one split.
    sha256
        Digest of the file, as hexadecimal digits.
    width, height
        Size in pixels, as shown.
    grey
        Whether the picture has one channel.
    header
        How the file can be read.
    mask, mask_sha256, mask_header
        The same for the picture's mask; None where it has none.
    """

    source: str
    split: str
    group: str
    sha256: str
    width: int
    height: int
    grey: bool
    header: PictureHeader
    mask: str | None = None
    mask_sha256: str | None = None
    mask_header: PictureHeader | None = None


@dataclass(frozen=True)
class Survey:
    """What there is to cut, and what is refused: found = parents + refused pictures.

    Attributes
    ----------
    parents
        Sorted by path.
    rejected
        Sorted by path.
    found
        Number of listed pictures.
    warnings
        Remarks for the user, one line each.
    """

    parents: tuple[Parent, ...]
    rejected: tuple[Rejection, ...]
    found: int
    warnings: tuple[str, ...] = ()

    @property
    def grey(self) -> bool:
        """Whether every picture has one channel."""
        return all(parent.grey for parent in self.parents)


def list_pictures(settings: BuildSettings) -> SourceListing:
    """List every picture and mask below `input_root`.

    Raises
    ------
    SourceError, ConfigError
        If there is nothing to cut, or if a file cannot be read.
    """
    try:
        # Listed as a plain folder: whether a file is a picture or a mask is decided here by its
        # name, and the format of masks would refuse a picture that has none.
        listing = list_sources(settings.model_copy(update={"format": "folder"}))
    except WarehouseError as error:
        # Listing belongs to the build, and names its settings.
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
    """Read every header, pair pictures with masks, and assign splits.

    Parameters
    ----------
    least
        The shortest side that a picture may have, in pixels: that of a patch.
    unreadable
        Pictures that failed while they were cut, with their errors, by path.

    Raises
    ------
    ThresholdError
        If more than `settings.max_invalid` pictures are refused, or if none is left.
    """
    parsed = parse_masks(listing)
    mask_of = {raw.source: raw.mask for raw in parsed.pictures}
    # A picture without a mask is no fault here: it is predicted.
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
            rejected.append(Rejection(source, "picture", error.reason, _detail(error)))
    invalid = [line for line in rejected if line.kind == "picture"]
    if len(invalid) > settings.max_invalid or not parents:
        raise _too_many(invalid, listing, settings)

    # Splits are assigned to whole pictures before cutting. Patches of one picture overlap, so that
    # a random split of patches would leak training pixels into the held-out split.
    parents, warnings = _with_splits(parents, settings)
    if orphans:
        # Not an error. But a misspelt name would turn a picture to learn from into one that is only
        # predicted.
        example = f"such as {orphans[0]}"
        warnings += (f"{len(orphans)} masks have no picture of their name, {example}",)
    order = sorted(rejected, key=lambda line: (line.path, line.kind, line.reason))
    return Survey(tuple(parents), tuple(order), len(listing.pictures), warnings)


def _detail(error: PictureError) -> str:
    if error.expected is not None:
        return f"expected {error.expected}, found {error.found}"
    return str(error.found or "")


def _too_many(
    invalid: Sequence[Rejection], listing: SourceListing, settings: BuildSettings
) -> ThresholdError:
    shown = ", ".join(
        f"{line.path} ({line.reason}: {line.detail[:160]})" for line in invalid[:MOST_SHOWN]
    )
    reasons = {line.reason for line in invalid}
    remedies = [text for reason, text in REMEDIES.items() if reason in reasons]
    remedies.append("mend or remove them")
    return ThresholdError(
        "pictures cannot be used",
        where=shown or listing.root,
        expected=f"at most {settings.max_invalid}",
        found=f"{len(invalid)} of {len(listing.pictures)}",
        remedy=(
            f"{', or '.join(remedies)}, or leave them out with --segment.max_invalid {len(invalid)}"
        ),
    )


def _with_splits(
    parents: Sequence[Parent], settings: BuildSettings
) -> tuple[list[Parent], tuple[str, ...]]:
    """Assign splits to the pictures that have a mask."""
    # Pictures that are only predicted take no part, or the shares of the splits would be off.
    masked = [parent for parent in parents if parent.mask is not None]
    if not masked:
        return list(parents), ()
    sources, digests = [each.source for each in masked], [each.sha256 for each in masked]
    assigned = assign_splits(sources, digests, settings)
    chosen = dict(zip(sources, zip(assigned.splits, assigned.groups, strict=True), strict=True))
    placed = []
    for parent in parents:
        split, group = chosen.get(parent.source, (parent.split, parent.group))
        placed.append(replace(parent, split=split, group=group))
    return placed, tuple(assigned.warnings)


def _judge(
    source: str, mask: str | None, listing: SourceListing, settings: BuildSettings, least: int
) -> Parent:
    header = read_window_header(listing.root, source, max_pixels=settings.max_pixels)
    size = (header.width, header.height)
    if min(size) < least:
        raise PictureError(
            "smaller_than_patch",
            where=source,
            expected=f"sides of at least {least} pixels",
            found=f"{size[0]} x {size[1]}",
            remedy="lower --segment.patch_size",
        )
    parent = Parent(
        source=source,
        split=PREDICT,
        group=source,
        sha256=listing.sha256_of(source),
        width=size[0],
        height=size[1],
        grey=header.grey,
        header=header,
    )
    if mask is None:
        return parent
    return replace(
        parent,
        mask=mask,
        mask_sha256=listing.sha256_of(mask),
        mask_header=_mask_header(source, mask, size, listing, settings),
    )


def _mask_header(
    source: str,
    mask: str,
    size: tuple[int, int],
    listing: SourceListing,
    settings: BuildSettings,
) -> PictureHeader:
    try:
        header = read_window_header(listing.root, mask, max_pixels=settings.max_pixels)
    except PictureError as error:
        raise PictureError("mask_unreadable", where=source, found=str(error)) from None
    if (header.width, header.height) != size:
        raise PictureError(
            "mask_size",
            where=source,
            expected=f"{size[0]} x {size[1]}",
            found=f"{mask} with {header.width} x {header.height}",
        )
    return header
