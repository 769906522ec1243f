"""Scenes with boxes, written as Pascal VOC, COCO or YOLO."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from ingest.synthetic.scenes import CLASSES, Scene, draw_scene
from ingest.synthetic.settings import SampleSettings

__all__ = ["write_scenes"]

JPEG_QUALITY = 92
NamedScene = tuple[str, Scene]
"""A scene and the stem of its file."""


def write_scenes(
    output: Path, settings: SampleSettings, progress: Callable[[int], None] | None
) -> None:
    """Draw and write the pictures, then their annotations in the format of the settings."""
    folder = output / ("JPEGImages" if settings.format == "voc" else "images")
    folder.mkdir()
    scenes: list[NamedScene] = []
    for index in range(settings.count):
        scene = draw_scene(settings.seed, index, settings.size, single_box=settings.single_box)
        name = f"scene_{index:05d}"
        _write_jpeg(folder / f"{name}.jpg", scene)
        # Without the pixels: 100,000 pictures would not fit in memory.
        scenes.append((name, Scene(scene.picture[:0].copy(), scene.boxes_xyxy, scene.labels)))
        if progress is not None:
            progress(1)
    write = {"voc": _write_voc, "coco": _write_coco, "yolo": _write_yolo}[settings.format]
    write(output, scenes, settings.size)


def _write_jpeg(path: Path, scene: Scene) -> None:
    import cv2

    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    # OpenCV expects blue first.
    done, data = cv2.imencode(".jpg", scene.picture[:, :, ::-1], options)
    assert done
    path.write_bytes(data.tobytes())


def _write_voc(output: Path, scenes: Sequence[NamedScene], size: tuple[int, int]) -> None:
    folder = output / "Annotations"
    folder.mkdir()
    for name, scene in scenes:
        lines = [
            "<annotation>",
            f"  <filename>{escape(name)}.jpg</filename>",
            f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>",
        ]
        for (x1, y1, x2, y2), label in _boxes(scene):
            lines.append(
                f"  <object><name>{CLASSES[label]}</name>"
                "<truncated>0</truncated><difficult>0</difficult>"
                f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
                f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            )
        (folder / f"{name}.xml").write_text("\n".join([*lines, "</annotation>", ""]))


def _write_coco(output: Path, scenes: Sequence[NamedScene], size: tuple[int, int]) -> None:
    (output / "annotations").mkdir()
    annotations: list[dict[str, Any]] = []
    for index, (_, scene) in enumerate(scenes):
        for (x1, y1, x2, y2), label in _boxes(scene):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    # Ids of COCO begin with 1: they are names, not indices.
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


def _write_yolo(output: Path, scenes: Sequence[NamedScene], size: tuple[int, int]) -> None:
    (output / "labels").mkdir()
    names = "".join(f"  {at}: {name}\n" for at, name in enumerate(CLASSES))
    (output / "data.yaml").write_text(f"path: .\ntrain: images\nnames:\n{names}")
    height, width = size
    for name, scene in scenes:
        lines = []
        for (x1, y1, x2, y2), label in _boxes(scene):
            fractions = (
                (x1 + x2) / 2 / width,
                (y1 + y2) / 2 / height,
                (x2 - x1) / width,
                (y2 - y1) / height,
            )
            numbers = " ".join(f"{value:.6f}" for value in fractions)
            lines.append(f"{label} {numbers}\n")
        (output / "labels" / f"{name}.txt").write_text("".join(lines))


def _boxes(scene: Scene) -> list[tuple[list[int], int]]:
    """The boxes of a scene, xyxy in pixels, with their labels."""
    return list(zip(scene.boxes_xyxy.tolist(), scene.labels, strict=True))
