"""Cut large images into a published version of patches, and list the patches in a manifest.

What lists, reads and cuts images is in `ingest`, which this package does not import: the command
passes a `PictureSource` in.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from segmentation.patches import ParentLike, patch_recipe, plan_patches
from segmentation.settings import SegmentSettings
from utils.jobs.bake_version import bake_once
from utils.log import get_log
from warehouse.errors import PictureError
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.layouts.plan import BuildPlan, LoadSample
from warehouse.read.version import Warehouse

__all__ = ["PictureSource", "cut_patches", "write_patch_manifest"]

log = get_log(__name__)


class Surveyed(Protocol):
    """What reading the header of every image found."""

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
    """A folder of large images that are listed and hashed already."""

    @property
    def fingerprint(self) -> str:
        """The digest of all files, by name and content."""

    @property
    def decoders(self) -> Mapping[str, str]:
        """Versions of the libraries that decode and cut."""

    def survey(self, unreadable: dict[str, PictureError]) -> Surveyed:
        """Read the header of every image, except for those that turned out to be unreadable."""

    def cutter(self, channels: int) -> LoadSample:
        """Return the function that cuts a patch of so many channels and its mask."""


def cut_patches(source: PictureSource, settings: SegmentSettings) -> Warehouse:
    """Return the version of patches below `settings.folder`, and cut it if it is not there."""
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

    # In this process, one after another: so each image is decoded once, and one is in memory.
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
            "%d images are left out; the reasons are in %s",
            patches.manifest.rejected,
            Path(str(patches.folder)) / "rejected.jsonl",
        )


def write_patch_manifest(warehouse: Warehouse, folder: Path) -> Path:
    """Write patch_manifest.v<NNN>.parquet and .csv of a version of patches, a row for each patch.

    Parameters
    ----------
    warehouse
        A version of patches.
    folder
        Where the manifests are.

    Returns
    -------
    Path
        The Parquet file; an existing one where it has the same contents already.

    Notes
    -----
    `offset_x` and `offset_y` are those used, `shift_x` and `shift_y` the pixels by which they were
    moved inward from the regular grid. `features_path` is the stored chunk that holds the patch,
    below the root of the warehouse, and `slot` the position in that chunk.
    """
    rows = _manifest_rows(warehouse)
    sink, text = pa.BufferOutputStream(), io.StringIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    data = sink.getvalue().to_pybytes()

    # No manifest is ever overwritten, since results may refer to it; equal ones share a number.
    known = sorted(folder.glob("patch_manifest.v[0-9][0-9][0-9].parquet"))
    for path in known:
        if path.read_bytes() == data:
            return path
    number = 1 + max((int(path.name.split(".v")[1][:3]) for path in known), default=0)

    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)

    # The Parquet file last: it is what says that a number is taken.
    target = folder / f"patch_manifest.v{number:03d}.parquet"
    durable.write_bytes(target.with_suffix(".csv"), text.getvalue().encode())
    durable.write_bytes(target, data)
    return target


def _manifest_rows(warehouse: Warehouse) -> list[dict[str, Any]]:
    settings = warehouse.manifest.recipe["settings"]
    stride = settings["patch_size"] - settings["overlap"]
    rows = []
    for sample in warehouse.table(tables.SAMPLES).to_pylist():
        split, index = sample["split"], sample["index"]
        chunk, slot = divmod(index, settings["job_size"])
        array = f"{warehouse.version}/{tables.STORE}/{split}/image"
        rows.append(
            {
                "patch_id": f"{sample['source']}#{sample['row']}-{sample['column']}",
                "parent": sample["source"],
                "split": split,
                **{name: sample[name] for name in ("x1", "y1", "x2", "y2", "row", "column")},
                "offset_x": sample["x1"],
                "offset_y": sample["y1"],
                "shift_x": sample["column"] * stride - sample["x1"],
                "shift_y": sample["row"] * stride - sample["y1"],
                "parent_width": sample["raw_width"],
                "parent_height": sample["raw_height"],
                "index": index,
                "features_path": f"{array}/c/{chunk}/0/0/0",
                "slot": slot,
            }
        )
    return rows
