"""A small labelled set from nothing but a seed: scenes of discs, blocks and rings among clutter, as
VOC, COCO or YOLO.

Boxes are learnable yet not trivial: objects overlap, sizes span a factor of ten, contrast varies,
and the clutter (strokes, blobs, hollow triangles, noise) is not labelled. One picture in 33 is
empty. Picture i follows from (seed, i) alone, so that a longer set begins with the shorter one.
Given up: realism; what is learnt here is of no use elsewhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from ingest.synthetic.labels import write_classes, write_masks
from ingest.synthetic.landscape import write_landscape
from ingest.synthetic.settings import SampleSettings
from warehouse.errors import SourceError

__all__ = ["CLASSES", "Scene", "draw_scene", "make_sample"]

CLASSES = ("disc", "block", "ring")
MARKER = "sample.json"
OWN_FOLDERS = (
    "JPEGImages",
    "Annotations",
    "images",
    "labels",
    "annotations",
    "scenes",
    "masks",
    *CLASSES,
)
OWN_FILES = ("data.yaml", "raster.yaml", "terrain.tif", "cover.tif", "height.tif", MARKER)
EMPTY_EVERY = 33
MOST_OBJECTS = 12
JPEG_QUALITY = 92


@dataclass(frozen=True, slots=True)
class Scene:
    """picture: uint8 [H, W, 3] RGB; boxes_xyxy: int64 [n, 4], pixels, tight; labels.

    Indices into CLASSES.
    """

    picture: NDArray[np.uint8]
    boxes_xyxy: NDArray[np.int64]
    labels: tuple[int, ...]


def make_sample(
    settings: SampleSettings, *, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write the set into `output`; {"path", "count"}. A cube's `count` is its dates.

    Raises SourceError where `output` is a file or holds something else.
    """
    output = Path(settings.output)
    _make_room(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        # The marker comes first: a sample that was interrupted may be made again.
        (output / MARKER).write_text(
            json.dumps(
                {
                    "made_by": "make_sample",
                    "settings": settings.model_dump(mode="json", exclude={"output"}),
                },
                indent=1,
            )
        )
        if settings.kind == "cube":
            write_landscape(output, settings.count, settings.size, settings.seed, progress)
        elif settings.kind == "classes":
            write_classes(
                output,
                settings.count,
                partial(draw_one, settings.seed, size=settings.size),
                CLASSES,
                progress,
            )
        elif settings.kind == "masks":
            write_masks(
                output,
                settings.count,
                partial(draw_masked, settings.seed, size=settings.size),
                progress,
            )
        else:
            _write_scenes(output, settings, progress)
    except OSError as error:
        raise SourceError(
            "the sample cannot be written",
            where=output,
            found=error.strerror,
            remedy="choose another --sample.output",
        ) from None
    return {"path": str(output), "count": settings.count}


def _write_scenes(
    output: Path, settings: SampleSettings, progress: Callable[[int], None] | None
) -> None:
    import cv2

    folder = output / ("JPEGImages" if settings.format == "voc" else "images")
    folder.mkdir()
    scenes: list[tuple[str, Scene]] = []
    for index in range(settings.count):
        scene = draw_scene(settings.seed, index, settings.size, single_box=settings.single_box)
        name = f"scene_{index:05d}"
        done, data = cv2.imencode(
            ".jpg", scene.picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        )
        assert done
        (folder / f"{name}.jpg").write_bytes(data.tobytes())
        scenes.append((name, Scene(scene.picture[:0], scene.boxes_xyxy, scene.labels)))
        if progress is not None:
            progress(1)
    {"voc": _write_voc, "coco": _write_coco, "yolo": _write_yolo}[settings.format](
        output, scenes, settings.size
    )


def draw_scene(seed: int, index: int, size: tuple[int, int], *, single_box: bool = False) -> Scene:
    """Scene `index` of a seed; `single_box`: exactly one object, always of the first class."""
    rng = np.random.default_rng([seed, index])
    picture = _background(rng, size)
    _clutter(rng, picture)
    empty = not single_box and index % EMPTY_EVERY == EMPTY_EVERY - 1
    count = 1 if single_box else 0 if empty else int(rng.integers(1, MOST_OBJECTS + 1))
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(count):
        box = _place(rng, size, boxes, single_box)
        if box is None:
            continue
        label = 0 if single_box else int(rng.integers(len(CLASSES)))
        _paint(rng, picture, box, label)
        boxes.append(box)
        labels.append(label)
    picture = _noisy(rng, picture)
    return Scene(picture, np.array(boxes, np.int64).reshape(-1, 4), tuple(labels))


def draw_one(seed: int, index: int, *, size: tuple[int, int]) -> tuple[NDArray[np.uint8], int]:
    """Picture `index` of a seed with one object, and its class."""
    rng = np.random.default_rng([seed, index])
    picture, label = _background(rng, size), index % len(CLASSES)
    _clutter(rng, picture)
    box = _place(rng, size, [], True)
    assert box is not None
    _paint(rng, picture, box, label)
    return _noisy(rng, picture), label


def draw_masked(
    seed: int, index: int, *, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Picture `index` of a seed and, bool [H, W], where its objects are."""
    rng = np.random.default_rng([seed, index])
    picture = _background(rng, size)
    _clutter(rng, picture)
    mask = np.zeros(size, np.bool_)
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(2, MOST_OBJECTS + 1))):
        box = _place(rng, size, boxes, False)
        if box is not None:
            cover = _paint(rng, picture, box, int(rng.integers(len(CLASSES))))
            mask[box[1] : box[3], box[0] : box[2]] |= cover
            boxes.append(box)
    return _noisy(rng, picture), mask


def _noisy(rng: np.random.Generator, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.clip(picture.astype(np.float64) + rng.normal(0, 6, picture.shape), 0, 255).astype(
        np.uint8
    )


def _background(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.uint8]:
    import cv2

    coarse = rng.integers(60, 190, (5, 5, 3)).astype(np.uint8)
    smooth: NDArray[np.uint8] = cv2.resize(
        coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC
    )
    return smooth


def _clutter(rng: np.random.Generator, picture: NDArray[np.uint8]) -> None:
    import cv2

    height, width = picture.shape[:2]
    side = min(height, width)
    for _ in range(int(rng.integers(6, 18))):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(int(v) for v in rng.integers(30, 226, 3))
        reach = int(rng.integers(side // 30 + 2, side // 6 + 3))
        kind = int(rng.integers(3))
        if kind == 0:
            angle = rng.uniform(0, 2 * np.pi)
            cv2.line(
                picture,
                (x, y),
                (int(x + reach * np.cos(angle)), int(y + reach * np.sin(angle))),
                colour,
                int(rng.integers(1, 4)),
                cv2.LINE_AA,
            )
        elif kind == 1:
            cv2.circle(
                picture, (x, y), int(rng.integers(1, side // 60 + 3)), colour, -1, cv2.LINE_AA
            )
        else:
            corners = rng.integers(-reach // 2, reach // 2 + 1, (3, 2)) + np.array([x, y])
            cv2.polylines(
                picture,
                [corners.astype(np.int32)],
                True,
                colour,
                int(rng.integers(1, 3)),
                cv2.LINE_AA,
            )


def _place(
    rng: np.random.Generator,
    size: tuple[int, int],
    boxes: Sequence[tuple[int, int, int, int]],
    large: bool,
) -> tuple[int, int, int, int] | None:
    """A box in the picture that hides none of `boxes`, nor lies in one; None after twenty tries."""
    height, width = size
    side = min(height, width)
    for _ in range(20):
        low, high = (0.15, 0.5) if large else (0.05, 0.4)
        # Sizes even in their logarithm: as many small objects as large ones.
        extent = side * low * (high / low) ** rng.uniform()
        aspect = 2 ** rng.uniform(-0.5, 0.5)
        w, h = max(8, round(extent * aspect)), max(8, round(extent / aspect))
        x, y = int(rng.integers(0, max(1, width - w))), int(rng.integers(0, max(1, height - h)))
        box = (x, y, x + w, y + h)
        if all(_covered(box, other) < 0.35 for other in boxes):
            return box
    return None


def _covered(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Shared area over that of the smaller box."""
    w = min(one[2], other[2]) - max(one[0], other[0])
    h = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0, w) * max(0, h) / smaller


def _paint(
    rng: np.random.Generator, picture: NDArray[np.uint8], box: tuple[int, int, int, int], label: int
) -> NDArray[np.bool_]:
    """Paint an object whose outermost pixels touch all four sides of `box`.

    Which pixels of the box it covers.
    """
    import cv2

    x1, y1, x2, y2 = box
    h, w = y2 - y1, x2 - x1
    yy, xx = np.mgrid[0:h, 0:w]
    radius = np.hypot((xx + 0.5 - w / 2) / (w / 2), (yy + 0.5 - h / 2) / (h / 2))
    if CLASSES[label] == "disc":
        cover = radius <= 1
    elif CLASSES[label] == "block":
        cover = np.ones((h, w), np.bool_)
    else:
        cover = (radius <= 1) & (radius >= 0.6)
    patch = picture[y1:y2, x1:x2]
    colour = rng.integers(0, 256, 3).astype(np.float64)
    # Push the colour away from what lies below, or the object could not be seen.
    below = patch.reshape(-1, 3).mean(axis=0)
    contrast = rng.uniform(45, 110)
    step = colour - below
    colour = np.clip(below + step * contrast / max(np.abs(step).max(), 1), 0, 255)
    shade = cv2.resize(rng.uniform(-14, 14, (3, 3)), (w, h), interpolation=cv2.INTER_LINEAR)
    patch[cover] = np.clip(colour + shade[:, :, None], 0, 255).astype(np.uint8)[cover]
    return cover


def _make_room(output: Path) -> None:
    """Empty `output` of an earlier sample.

    Raises SourceError where it holds anything that make_sample did not write.
    """
    remedy = "choose another --sample.output, or empty the folder yourself"
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise SourceError("the sample's output is not a folder", where=output, remedy=remedy)
    if not output.exists():
        return
    names = {entry.name for entry in output.iterdir()}
    if names and MARKER not in names:
        raise SourceError(
            "the output folder is not empty and holds no earlier sample",
            where=output,
            remedy=remedy,
        )
    foreign = sorted(names - {*OWN_FOLDERS, *OWN_FILES})
    if foreign:
        raise SourceError(
            "the output folder holds more than an earlier sample",
            where=output,
            found=foreign[0],
            remedy=remedy,
        )
    try:
        for name in OWN_FOLDERS:
            if name in names:
                shutil.rmtree(output / name)
        for name in OWN_FILES:
            if name != MARKER:
                (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise SourceError(
            "the earlier sample cannot be removed",
            where=output,
            found=str(error)[:120],
            remedy=remedy,
        ) from None


def _write_voc(output: Path, scenes: Sequence[tuple[str, Scene]], size: tuple[int, int]) -> None:
    folder = output / "Annotations"
    folder.mkdir()
    for name, scene in scenes:
        lines = [
            "<annotation>",
            f"  <filename>{escape(name)}.jpg</filename>",
            f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>",
        ]
        for (x1, y1, x2, y2), label in zip(scene.boxes_xyxy.tolist(), scene.labels, strict=True):
            lines.append(
                f"  <object><name>{CLASSES[label]}</name><truncated>0</truncated><difficult>0</difficult>"
                f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            )
        (folder / f"{name}.xml").write_text("\n".join([*lines, "</annotation>", ""]))


def _write_coco(output: Path, scenes: Sequence[tuple[str, Scene]], size: tuple[int, int]) -> None:
    (output / "annotations").mkdir()
    annotations: list[dict[str, Any]] = []
    for index, (_, scene) in enumerate(scenes):
        for (x1, y1, x2, y2), label in zip(scene.boxes_xyxy.tolist(), scene.labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "iscrowd": 0,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "segmentation": [],
                }
            )
    content = {
        "categories": [
            {"id": at + 1, "name": name, "supercategory": "shape"}
            for at, name in enumerate(CLASSES)
        ],
        "images": [
            {"id": at, "file_name": f"{name}.jpg", "width": size[1], "height": size[0]}
            for at, (name, _) in enumerate(scenes)
        ],
        "annotations": annotations,
    }
    (output / "annotations" / "instances_all.json").write_text(json.dumps(content))


def _write_yolo(output: Path, scenes: Sequence[tuple[str, Scene]], size: tuple[int, int]) -> None:
    (output / "labels").mkdir()
    (output / "data.yaml").write_text(
        "\n".join(
            [
                "path: .",
                "train: images",
                "names:",
                *(f"  {at}: {name}" for at, name in enumerate(CLASSES)),
                "",
            ]
        )
    )
    height, width = size
    for name, scene in scenes:
        lines = []
        for (x1, y1, x2, y2), label in zip(scene.boxes_xyxy.tolist(), scene.labels, strict=True):
            fractions = (
                (x1 + x2) / 2 / width,
                (y1 + y2) / 2 / height,
                (x2 - x1) / width,
                (y2 - y1) / height,
            )
            lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in fractions) + "\n")
        (output / "labels" / f"{name}.txt").write_text("".join(lines))
