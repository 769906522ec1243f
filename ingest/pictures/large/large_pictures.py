"""A folder of large pictures with masks: listed, surveyed and cut into patches."""

from __future__ import annotations

from collections.abc import Mapping

from ingest.pictures.large.patch_cutter import PatchCutter, cut_versions
from ingest.pictures.large.survey import Survey, list_pictures, survey
from warehouse.errors import PictureError
from warehouse.settings import BuildSettings

__all__ = ["LargePictures"]


class LargePictures:
    """The pictures and masks below `build.input_root`, listed and hashed on construction.

    Parameters
    ----------
    build
        Where the pictures lie, the values of their masks, and how they are split.
    patch_size
        Side of a patch in pixels; smaller pictures are refused.
    """

    def __init__(self, build: BuildSettings, patch_size: int) -> None:
        self.build = build
        self.patch_size = patch_size
        self.listing = list_pictures(build)

    @property
    def found(self) -> str:
        """One line on what was listed."""
        listing = self.listing
        pictures, masks = len(listing.pictures), len(listing.annotations)
        return f"{pictures} pictures and {masks} masks in {listing.root}"

    @property
    def fingerprint(self) -> str:
        """The digest of all files, by name and content."""
        return self.listing.fingerprint

    @property
    def decoders(self) -> Mapping[str, str]:
        """Versions of the libraries that decode and cut."""
        return cut_versions()

    def survey(self, unreadable: Mapping[str, PictureError]) -> Survey:
        """Look at every picture, except for those that turned out to be unreadable."""
        return survey(self.listing, self.build, least=self.patch_size, unreadable=unreadable)

    def cutter(self, channels: int) -> PatchCutter:
        """The function that cuts a patch of so many channels and its mask."""
        build = self.build
        return PatchCutter(self.listing.root, channels, build.mask_values, build.max_pixels)
