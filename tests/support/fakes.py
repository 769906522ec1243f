"""A small version without ingest.

Samples whose pixels follow from their number, so that any reader has an independent oracle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from warehouse import Warehouse
from warehouse.errors import PictureError
from warehouse.format.manifest import toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, picture_arrays
from warehouse.layouts.picture_summary import PictureFacts, summarise, summarise_by
from warehouse.layouts.pictures import Pictures
from warehouse.layouts.plan import BuildPlan, SplitPlan
from warehouse.settings import BuildSettings
from warehouse.write.publish import bake, open_root

DATA = Path(__file__).parents[3] / "shared" / "data"
SMALL = BuildSettings(target_size=(16, 24), max_boxes=3, shard_samples=8)


def sample(number: int, settings: BuildSettings = SMALL) -> dict[str, np.ndarray]:
    """The arrays of sample `number`: random pixels, number % 4 boxes."""
    rng = np.random.default_rng(number)
    height, width = settings.target_size
    image = rng.integers(0, 256, (3, height, width)).astype(np.uint8)
    if settings.dtype != "uint8":
        image = (image / 255).astype(settings.dtype)
    count = min(number % 4, settings.max_boxes)
    box = np.zeros((settings.max_boxes, 4), np.float32)
    corners = np.sort(rng.random((count, 2, 2)), axis=1)
    box[:count] = corners.reshape(count, 4)
    mask = np.arange(settings.max_boxes) < count
    label = np.where(mask, number % 2, -1).astype(np.int16)
    flags = np.where(mask, 4 * (number % 2), 0).astype(np.uint8)
    letterbox = np.array([1, 1, 0, 0, width, height], np.float32)
    return {
        "image": image,
        "box": box,
        "box_mask": mask,
        "box_flags": flags,
        "label": label,
        "letterbox": letterbox,
    }


class Load:
    """payload (split offset, index) -> arrays; numbers in `bad` cannot be read."""

    def __init__(self, settings: BuildSettings = SMALL, bad: tuple[int, ...] = ()) -> None:
        self.settings, self.bad = settings, bad

    def __call__(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        if number in self.bad:
            raise PictureError("unreadable", where=f"pictures/{number}.jpg")
        return sample(number, self.settings), {"read": 0.0}


def numbers(split: str, count: int) -> list[int]:
    return list(
        range(
            1000 * ("train", "val", "test").index(split),
            1000 * ("train", "val", "test").index(split) + count,
        )
    )


def plan_of(
    counts: dict[str, int],
    settings: BuildSettings = SMALL,
    leave_out: tuple[int, ...] = (),
    **recipe: Any,
) -> BuildPlan:
    splits, facts = [], []
    for name, count in counts.items():
        payloads = [number for number in numbers(name, count) if number not in leave_out]
        rows = tuple(
            {
                "source": f"pictures/{n}.jpg",
                "source_sha256": f"{n:064x}",
                "raw_width": 24,
                "raw_height": 16,
                "orientation": 1,
                "group": str(n),
                "folder": "pictures",
                "boxes": n % 4,
                "clipped": 0,
                "dropped": 0,
                "duplicates": 0,
            }
            for n in payloads
        )
        labels = [np.full(n % 4, n % 2, np.int16) for n in payloads]
        facts += [
            PictureFacts(name, "pictures", label, np.full(len(label), 4.0)) for label in labels
        ]
        splits.append(
            SplitPlan(
                name=name,
                specs=tuple(picture_arrays(len(payloads), settings)),
                payloads=tuple(payloads),
                digests=tuple(map(str, payloads)),
                rows=rows,
            )
        )
    full = {
        "format_version": FORMAT_VERSION,
        "settings": settings.content(),
        "counts": counts,
    } | recipe
    version, key = version_name(full)
    by_split = summarise_by(facts, ["a", "b"], "split")
    summary = {
        "all": summarise(facts, ["a", "b"]),
        "splits": by_split,
        "folders": summarise_by(facts, ["a", "b"], "folder"),
    }
    total = sum(counts.values())
    return BuildPlan(
        version=version,
        key=key,
        recipe=full,
        toolchain=toolchain(),
        splits=tuple(splits),
        class_names=("a", "b"),
        found=total,
        kept=total - len(leave_out),
        summary=summary,
        group_summaries=by_split,
        layout=Pictures(),
    )


def build(
    root: Path,
    counts: dict[str, int] | None = None,
    settings: BuildSettings = SMALL,
    *,
    workers: int = 0,
    bad: tuple[int, ...] = (),
    clear: bool = False,
    **recipe: Any,
) -> Warehouse:
    counts = counts or {"train": 29, "val": 9}
    open_root(root)

    def make_plan(unreadable: dict[str, PictureError]) -> BuildPlan:
        return plan_of(
            counts, settings, tuple(int(Path(name).stem) for name in unreadable), **recipe
        )

    bake(
        make_plan,
        lambda _: Load(settings, bad),
        root,
        workers=workers,
        cluster=None,
        trace=True,
        on_plan=lambda _: None,
        clear=clear,
    )
    return Warehouse.open(root)
