"""Ten-line makers of source folders for the ingest tests."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ingest.pictures.validate import Scan, scan
from ingest.records.list_sources import list_sources
from ingest.sources.listing import SourceListing
from warehouse.settings import BuildSettings

DATA = Path(__file__).parents[3] / "shared" / "data"


def picture(width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """Smooth colours that differ by seed: JPEG keeps them within a few levels."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * (1 + c) + y * (3 - c)) / 17 + seed + c) for c in range(3)]
    return np.stack([(127 + 100 * wave).astype(np.uint8) for wave in waves], axis=2)


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def write_picture(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(width, height, seed), quality=95))


def voc_xml(
    boxes: Sequence[tuple[str, Any, Any, Any, Any]],
    size: tuple[int, int] | None = (64, 48),
    extra: str = "",
) -> str:
    declared = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    items = "".join(
        f"<object><name>{name}</name>{extra}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    return (
        f"<annotation>\n<filename>../../etc/passwd</filename>\n{declared}\n{items}\n</annotation>\n"
    )


def voc_set(root: Path, boxes: dict[str, Sequence[tuple[str, Any, Any, Any, Any]]]) -> Path:
    """JPEGImages and Annotations below `root`, 64 x 48 pictures."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    for seed, (stem, items) in enumerate(boxes.items()):
        write_picture(root / "JPEGImages" / f"{stem}.jpg", seed=seed)
        (root / "Annotations" / f"{stem}.xml").write_text(voc_xml(items))
    return root


def coco_json(
    path: Path, images: Sequence[Any], categories: Sequence[Any], annotations: Sequence[Any]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"images": images, "categories": categories, "annotations": annotations})
    )


def settings_for(root: Path, **options: Any) -> BuildSettings:
    return BuildSettings(
        input_root=str(root), output_root=str(root.parent / "warehouse"), **options
    )


def listed(root: Path, **options: Any) -> tuple[SourceListing, BuildSettings]:
    settings = settings_for(root, **options)
    return list_sources(settings), settings


def scanned(root: Path, **options: Any) -> Scan:
    listing, settings = listed(root, **options)
    return scan(listing, settings)
