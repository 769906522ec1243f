"""Cutting large pictures into a published version of patches.

What lists, reads and cuts pictures lies in `ingest`, which this package does not import: the
command passes it in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from segmentation.patches import ParentLike, patch_recipe, plan_patches
from segmentation.settings import SegmentSettings
from utils.jobs.bake import bake_once
from utils.log import get_log
from warehouse.errors import PictureError
from warehouse.layouts.plan import BuildPlan, LoadSample
from warehouse.read.version import Warehouse

__all__ = ["PictureSource", "cut_patches"]

log = get_log(__name__)


class Surveyed(Protocol):
    """What a look at every picture's header found."""

    @property
    def parents(self) -> Sequence[ParentLike]: ...
    @property
    def grey(self) -> bool: ...
    @property
    def found(self) -> int: ...
    @property
    def rejected(self) -> Iterable[Any]: ...
    @property
    def warnings(self) -> Sequence[str]: ...


class PictureSource(Protocol):
    """A folder of large pictures that are listed and hashed already."""

    @property
    def fingerprint(self) -> str:
        """The digest of all files, by name and content."""

    @property
    def decoders(self) -> Mapping[str, str]:
        """Versions of the libraries that decode and cut."""

    def survey(self, unreadable: dict[str, PictureError]) -> Surveyed:
        """Look at every picture, except for those that turned out to be unreadable."""

    def cutter(self, channels: int) -> LoadSample:
        """The function that cuts a patch of so many channels and its mask."""


def cut_patches(source: PictureSource, settings: SegmentSettings) -> Warehouse:
    """The version of patches below `settings.folder`; cut now if it is not there."""
    root = settings.folder / "patches"
    recipe = patch_recipe(source.fingerprint, settings, source.decoders)

    def make_plan(unreadable: dict[str, PictureError]) -> BuildPlan:
        found = source.survey(unreadable)
        return plan_patches(
            found.parents,
            recipe,
            channels=settings.channels or (1 if found.grey else 3),
            found=found.found,
            rejected=found.rejected,
            warnings=found.warnings,
        )

    # In this process, one after another: so each picture is decoded once, and one is in memory.
    manifest = bake_once(
        recipe,
        make_plan,
        lambda plan: source.cutter(plan.splits[0].specs[0].shape[1]),
        root,
        noun="patches",
        verb="cutting",
    )
    patches = Warehouse.open(root / manifest.version)
    _report(patches)
    return patches


def _report(patches: Warehouse) -> None:
    """Log the warnings of a version of patches, whether or not it was cut just now."""
    for line in patches.manifest.warnings:
        log.warning("%s", line)
    if patches.manifest.rejected:
        log.warning(
            "%d pictures are left out; %s says why",
            patches.manifest.rejected,
            Path(str(patches.folder)) / "rejected.jsonl",
        )
