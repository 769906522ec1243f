"""From a path to parsed text annotations: one JSON file, or a text file for each picture.

A picture without an annotation is not an item. An annotation without its picture is an error, since
it would be lost without a word.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ingest.sources.files import PICTURE_EXTENSIONS, read_inside
from ingest.text.records import TextPicture, parse_icdar, parse_mmocr
from warehouse.errors import AnnotationError, SourceError

__all__ = ["read_text_annotation"]

MAX_ANNOTATION_BYTES = 1 << 30


def read_text_annotation(folder: Path, annotation: Path) -> list[TextPicture]:
    """Read the annotation of a folder of pictures.

    Parameters
    ----------
    folder
        Folder of the pictures.
    annotation
        MMOCR's JSON, or a folder of ICDAR 2015's `gt_<stem>.txt`.

    Returns
    -------
    list of TextPicture
        In the order of the JSON, or of the names of the text files.

    Raises
    ------
    SourceError
        If there is no such file, or no annotation in the folder.
    AnnotationError
        If a picture is listed twice, has none or several files, or if an entry is wrong.
    """
    if annotation.is_dir():
        return _parse_folder(folder, annotation)
    if not annotation.is_file():
        raise SourceError(
            "there is no such annotation",
            where=annotation,
            expected="MMOCR's JSON, or a folder of gt_*.txt",
        )
    data = read_inside(annotation.parent, annotation.name, limit=MAX_ANNOTATION_BYTES)
    pictures = parse_mmocr(data, str(annotation))
    # Which of two entries is right cannot be known.
    counts = Counter(picture.source for picture in pictures)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise AnnotationError("a picture is listed twice", where=annotation, found=repeated[0])
    return pictures


def _parse_folder(folder: Path, annotation: Path) -> list[TextPicture]:
    files = sorted(path.name for path in annotation.glob("gt_*.txt"))
    if not files:
        raise SourceError(
            "no annotations found",
            where=annotation,
            expected="gt_<stem>.txt beside or apart from the pictures",
        )
    by_stem: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICTURE_EXTENSIONS:
            by_stem.setdefault(path.stem, []).append(path.name)
    pictures = []
    for name in files:
        stem = name.removeprefix("gt_").removesuffix(".txt")
        names = by_stem.get(stem, [])
        if len(names) != 1:
            raise AnnotationError(
                "an annotation has no picture"
                if not names
                else "an annotation has several pictures",
                where=annotation / name,
                expected=f"one {folder / stem}.*",
                found=", ".join(names) or "none",
                remedy="restore the picture or take the annotation out",
            )
        parsed = parse_icdar(
            read_inside(annotation, name, limit=MAX_ANNOTATION_BYTES), str(annotation / name), stem
        )
        pictures.append(TextPicture(names[0], parsed.regions, None, parsed.annotation))
    return pictures
