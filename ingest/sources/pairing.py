"""Which annotation belongs to which picture, by name alone: the same stem, beside the picture or in
a sibling folder.

For a picture in `a/images/train` the folders tried are, nearest first, its own; then, with `labels`
(or `Annotations`, ...) put in place of or in front of each folder of its path, or in place of all
that follows: `a/labels/train`, `a/images/labels`, ... An annotation belongs to one picture: a
second one of the same stem is reported, never guessed. Given up: names inside the annotation files
(`<filename>`), which are often stale and would let a file name a path.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = [
    "ANNOTATION_FOLDERS",
    "Pairs",
    "in_annotation_folder",
    "is_mask",
    "pair_by_stem",
    "pairing_key",
]

ANNOTATION_FOLDERS = frozenset(
    {"annotation", "annotations", "label", "labels", "xml", "xmls", "ann", "anns"}
)
MASK_FOLDERS = frozenset(
    {
        "mask",
        "masks",
        "label",
        "labels",
        "gt",
        "groundtruth",
        "ground_truth",
        "annotation",
        "annotations",
        "segmentation",
    }
)
PICTURE_FOLDERS = frozenset({"image", "images", "img", "imgs", "picture", "pictures", "jpegimages"})
MASK_SUFFIX = re.compile(r"[_-](?:mask|label|gt|seg)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Pairs:
    """annotation_of: picture -> annotation. ambiguous.

    Picture -> what an earlier picture took. orphans: annotations left.
    """

    annotation_of: dict[str, str]
    ambiguous: dict[str, str]
    orphans: tuple[str, ...]


def in_annotation_folder(path: str) -> bool:
    """Whether any folder of a relative path is one that holds annotations by its name."""
    return any(part.lower() in ANNOTATION_FOLDERS for part in path.split("/")[:-1])


def is_mask(path: str) -> bool:
    """Whether a relative path names a mask and not a picture.

    By a folder such as `masks`, or a stem that ends in `_mask`.
    """
    folders = path.split("/")[:-1]
    return any(part.lower() in MASK_FOLDERS for part in folders) or bool(
        MASK_SUFFIX.search(posixpath.splitext(posixpath.basename(path))[0])
    )


def pairing_key(path: str) -> tuple[str, str]:
    """What a picture and its mask have in common.

    Folders but for `images`, `masks` and the like, and the stem without `_mask`.
    """
    *folders, name = path.split("/")
    kept = [part for part in folders if part.lower() not in MASK_FOLDERS | PICTURE_FOLDERS]
    return "/".join(kept), MASK_SUFFIX.sub("", posixpath.splitext(name)[0])


def pair_by_stem(pictures: Sequence[str], annotations: Iterable[str]) -> Pairs:
    """Pair sorted relative posix paths.

    A stem is the name without its last extension; case counts.
    """
    stems: dict[str, dict[str, str]] = defaultdict(dict)
    every: list[str] = sorted(annotations)
    for path in every:
        folder, name = posixpath.split(path)
        stems[folder].setdefault(posixpath.splitext(name)[0], path)
    candidates: dict[str, list[dict[str, str]]] = {}
    annotation_of: dict[str, str] = {}
    ambiguous: dict[str, str] = {}
    taken: set[str] = set()
    for picture in pictures:
        folder, name = posixpath.split(picture)
        if folder not in candidates:
            candidates[folder] = [stems[near] for near in _folders_near(folder, stems)]
        stem = posixpath.splitext(name)[0]
        found = next((table[stem] for table in candidates[folder] if stem in table), None)
        if found is None:
            continue
        if found in taken:
            ambiguous[picture] = found
        else:
            annotation_of[picture] = found
            taken.add(found)
    return Pairs(annotation_of, ambiguous, tuple(path for path in every if path not in taken))


def _folders_near(folder: str, known: Iterable[str]) -> list[str]:
    """Of the folders that hold annotations, those a picture in `folder` may look into, nearest
    first.
    """
    parts = tuple(folder.split("/")) if folder else ()
    shapes: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for at in range(len(parts), -1, -1):
        tails = [parts[at + 1 :], parts[at:], ()]
        shapes += [(parts[:at], tail) for tail in dict.fromkeys(tails)]
    by_shape: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    near = [folder] if folder in set(known) else []
    for other in sorted(known):
        split = other.split("/") if other else []
        for at, part in enumerate(split):
            if part.lower() in ANNOTATION_FOLDERS:
                by_shape[tuple(split[:at]), tuple(split[at + 1 :])].append(other)
    for shape in shapes:
        near += [other for other in by_shape.get(shape, []) if other not in near]
    return near
