"""Which annotation belongs to which picture, by name alone.

The two have the same stem, and the annotation lies beside the picture or in a sibling folder. For a
picture in `a/images/train` the folders tried are, nearest first, its own; then, with `labels` (or
`Annotations`, ...) put in place of or in front of each folder of its path, or in place of all that
follows: `a/labels/train`, `a/images/labels`, and so on. An annotation belongs to one picture: a
second one of the same stem is reported, never guessed. Names inside the annotation files
(`<filename>`) are not used: they are often stale, and would let a file name a path.
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
# `labels` is in both sets: it holds boxes in YOLO's data sets and masks in others.
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
CutPath = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Pairs:
    """How pictures and annotations belong together.

    Attributes
    ----------
    annotation_of
        Picture -> its annotation.
    ambiguous
        Picture -> the annotation of its stem, which an earlier picture took.
    orphans
        Annotations that belong to no picture.
    """

    annotation_of: dict[str, str]
    ambiguous: dict[str, str]
    orphans: tuple[str, ...]


def in_annotation_folder(path: str) -> bool:
    """Return whether any folder of a relative path holds annotations by its name."""
    return any(part.lower() in ANNOTATION_FOLDERS for part in path.split("/")[:-1])


def is_mask(path: str) -> bool:
    """Return whether a path names a mask: a folder such as `masks`, or a stem ending in `_mask`."""
    *folders, name = path.split("/")
    if any(part.lower() in MASK_FOLDERS for part in folders):
        return True
    return bool(MASK_SUFFIX.search(posixpath.splitext(name)[0]))


def pairing_key(path: str) -> tuple[str, str]:
    """Return what the paths of a picture and its mask have in common.

    Returns
    -------
    tuple
        The folders but for `images`, `masks` and the like, and the stem without `_mask`.
    """
    *folders, name = path.split("/")
    # Split folders stay in the key: `train/masks/1.png` does not belong to `val/images/1.png`.
    kept = [part for part in folders if part.lower() not in MASK_FOLDERS | PICTURE_FOLDERS]
    return "/".join(kept), MASK_SUFFIX.sub("", posixpath.splitext(name)[0])


def pair_by_stem(pictures: Sequence[str], annotations: Iterable[str]) -> Pairs:
    """Pair pictures and annotations.

    Parameters
    ----------
    pictures
        Sorted POSIX paths relative to the input root.
    annotations
        POSIX paths relative to the input root. A stem is the name without its last extension, in
        which upper and lower case differ.
    """
    stems: dict[str, dict[str, str]] = defaultdict(dict)
    in_order = sorted(annotations)
    for path in in_order:
        folder, name = posixpath.split(path)
        stems[folder].setdefault(posixpath.splitext(name)[0], path)

    candidates: dict[str, list[dict[str, str]]] = {}
    annotation_of: dict[str, str] = {}
    ambiguous: dict[str, str] = {}
    taken: set[str] = set()
    for picture in pictures:
        folder, name = posixpath.split(picture)
        # Once a folder, not once a picture: a data set has few folders and many pictures.
        if folder not in candidates:
            candidates[folder] = [stems[near] for near in _folders_near(folder, stems)]
        stem = posixpath.splitext(name)[0]
        found = next((table[stem] for table in candidates[folder] if stem in table), None)
        if found is None:
            continue
        # `a.jpg` and `a.png` share a stem: nothing says whose boxes `a.txt` holds.
        if found in taken:
            ambiguous[picture] = found
        else:
            annotation_of[picture] = found
            taken.add(found)
    return Pairs(annotation_of, ambiguous, tuple(path for path in in_order if path not in taken))


def _folders_near(folder: str, known: Iterable[str]) -> list[str]:
    """Return the folders, out of those with annotations, that a picture may have its own in.

    Nearest first. A path with the name of an annotation folder taken out falls into what stood
    before it and what stood after it; the picture's own path is cut in the same way.
    """
    parts = tuple(folder.split("/")) if folder else ()
    wanted: list[CutPath] = []
    for at in range(len(parts), -1, -1):
        # The annotation folder stands in place of folder `at`, in front of it, or ends the path.
        tails = [parts[at + 1 :], parts[at:], ()]
        wanted += [(parts[:at], tail) for tail in dict.fromkeys(tails)]

    cut: dict[CutPath, list[str]] = defaultdict(list)
    near = [folder] if folder in set(known) else []
    for other in sorted(known):
        split = other.split("/") if other else []
        for at, part in enumerate(split):
            if part.lower() in ANNOTATION_FOLDERS:
                cut[tuple(split[:at]), tuple(split[at + 1 :])].append(other)
    for each in wanted:
        near += [other for other in cut.get(each, []) if other not in near]
    return near
