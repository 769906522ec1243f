"""What lies under the input root: pictures, annotations, their hashes. Names and bytes only,
nothing is parsed.

The listing is what the version key stands on, so it must be complete, sorted and quick: 2,000 files
that were hashed before answer in a fraction of a second. Hidden files, `__MACOSX`, VOC's
segmentation masks and the output root are not sources. A link that leads out of the root is
refused, for a listed folder must not reach beyond itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from ingest.hashes import hash_files
from ingest.pairing import in_annotation_folder, is_mask, pair_by_stem
from warehouse.errors import SourceError
from warehouse.settings import BuildSettings

__all__ = [
    "PICTURE_EXTENSIONS",
    "SourceFile",
    "SourceListing",
    "input_root",
    "list_sources",
    "path_inside",
    "read_ends",
    "read_inside",
]

log = logging.getLogger(__name__)
PICTURE_EXTENSIONS = (
    ".bmp",
    ".gif",
    ".jfif",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".png",
    ".tif",
    ".tiff",
    ".webp",
)
SKIPPED_FOLDERS = frozenset({"__MACOSX", "SegmentationClass", "SegmentationObject"})
COCO_NAME = re.compile(
    r"^(?:(?:.*[._-])?coco(?:[._-].*)?|instances_.+|annotations?|labels)\.json$", re.IGNORECASE
)
NAMES_FILE = re.compile(
    r"^(?:data\.ya?ml|dataset\.ya?ml|classes\.txt|_darknet\.labels|.+\.names)$", re.IGNORECASE
)
NOT_LABELS = re.compile(
    r"^(?:classes|train|val|valid|test|trainval|readme.*|license.*|requirements|notes)\.txt$",
    re.IGNORECASE,
)
LOOKED_FOR = {
    "voc": "*.xml beside the pictures or in Annotations/",
    "coco": "_annotations.coco.json beside the pictures or annotations/instances_*.json",
    "yolo": "*.txt beside the pictures or in labels/",
    "masks": "images in masks/ or label/, or named *_mask beside the pictures",
}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that the build depends on. path: posix, relative to the input root; sha256: hex."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    sha256: str


@dataclass(frozen=True)
class SourceListing:
    """The input as found. pictures, annotations: sorted relative posix paths; files.

    Both, and lists of class names.
    """

    root: Path
    format: str
    pictures: tuple[str, ...]
    annotations: tuple[str, ...]
    files: tuple[SourceFile, ...]
    warnings: tuple[str, ...] = field(default=())

    @cached_property
    def _by_path(self) -> dict[str, SourceFile]:
        return {file.path: file for file in self.files}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the format and of every (name, sha256), sorted.

        The same for any root, time stamp or machine.
        """
        digest = hashlib.sha256(f"{self.format}\0".encode())
        for file in sorted(self.files, key=lambda file: file.path):
            digest.update(f"{file.path}\0{file.sha256}\0".encode())
        return digest.hexdigest()

    def sha256_of(self, path: str) -> str:
        return self._by_path[path].sha256

    def others(self) -> tuple[str, ...]:
        """Files that are neither pictures nor annotations: lists of class names."""
        own = {*self.pictures, *self.annotations}
        return tuple(sorted(file.path for file in self.files if file.path not in own))


def list_sources(
    settings: BuildSettings, *, progress: Callable[[int], None] | None = None
) -> SourceListing:
    """Walk `build.input_root`, recognise its format, hash what belongs to it. `progress` is called
    with numbers of files done.

    Raises SourceError: no input root, none such, a file; no pictures; no annotations of the format
    asked for; two formats at once; a link out of the root; a file that cannot be read.
    """
    root = input_root(settings)
    found = dict(_walk(root, Path(settings.output_root)))
    images = sorted(path for path in found if path.lower().endswith(PICTURE_EXTENSIONS))
    pictures = tuple(path for path in images if settings.format != "masks" or not is_mask(path))
    if not pictures:
        raise SourceError(
            "no pictures found",
            where=root,
            expected=f"files ending in {' '.join(PICTURE_EXTENSIONS)}",
            found=f"{len(found)} other files",
            remedy="point --build.input_root at the folder that holds the pictures",
        )
    warnings: list[str] = []
    kind, annotations = _recognise(
        root, pictures, tuple(sorted(set(found) - set(pictures))), settings.format, warnings
    )
    listed = [*pictures, *annotations]
    if kind == "yolo":
        listed += sorted(
            path for path in found if _may_name_classes(path) and path not in set(annotations)
        )
    listed.sort()
    digests = hash_files(
        [(root / path, found[path]) for path in listed], rehash=settings.rehash, progress=progress
    )
    files = tuple(
        SourceFile(path, found[path].st_size, found[path].st_mtime_ns, found[path].st_ino, digest)
        for path, digest in zip(listed, digests, strict=True)
    )
    return SourceListing(root, kind, pictures, annotations, files, tuple(warnings))


def read_inside(root: Path, path: str, *, limit: int, sha256: str | None = None) -> bytes:
    """The bytes of `path` below `root`, at most `limit`.

    Raises SourceError: outside, unreadable, too large, or not `sha256` any more.
    """
    target = path_inside(root, path)
    try:
        with open(target, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise SourceError(
                    "a source file is too large",
                    where=path,
                    expected=f"at most {limit} bytes",
                    found=f"{size} bytes",
                )
            data = file.readall()
    except OSError as error:
        raise SourceError(
            "a source file cannot be read", where=path, found=error.strerror
        ) from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise SourceError(
            "a source file changed while being built",
            where=path,
            remedy="run the same command again, with --build.rehash true if this stays",
        )
    return data


def read_ends(root: Path, path: str, *, head: int, tail: int) -> tuple[bytes, bytes, bool]:
    """(first bytes, last bytes, whether the first are all) of `path` below `root`.

    Raises SourceError: outside or unreadable.
    """
    try:
        with open(path_inside(root, path), "rb", buffering=0) as file:
            first = file.read(head)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - tail))
            return first, file.read(tail), len(first) == size
    except OSError as error:
        raise SourceError(
            "a source file cannot be read", where=path, found=error.strerror
        ) from None


def input_root(settings: BuildSettings) -> Path:
    if not settings.input_root:
        raise SourceError(
            "no input folder given",
            remedy="add --build.input_root FOLDER, or make a sample with python -m scripts.make_sample",
        )
    root = Path(settings.input_root).expanduser()
    if not root.exists():
        raise SourceError(
            "the input folder does not exist", where=root, remedy="check --build.input_root"
        )
    if not root.is_dir():
        raise SourceError(
            "the input is a file, not a folder",
            where=root,
            remedy="point --build.input_root at the folder that holds it",
        )
    return root


def _walk(root: Path, output_root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(relative posix path, stat) of every regular file that may be a source."""
    real_root, real_output = os.path.realpath(root), os.path.realpath(output_root)

    def fail(error: OSError) -> None:
        raise SourceError(
            "a source folder cannot be read", where=error.filename, found=error.strerror
        )

    for folder, folders, names in os.walk(root, onerror=fail):
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        for name in list(folders):
            full = os.path.join(folder, name)
            if (
                name.startswith(".")
                or name in SKIPPED_FOLDERS
                or os.path.realpath(full) == real_output
            ):
                folders.remove(name)
            elif os.path.islink(full):
                folders.remove(name)
                _check_link(full, real_root)
                log.warning("a linked folder is not followed: %s%s", prefix, name)
        folders.sort()
        for name in names:
            if name.startswith("."):
                continue
            full = os.path.join(folder, name)
            try:
                (prefix + name).encode()
            except UnicodeEncodeError:
                raise SourceError(
                    "a file name is not valid UTF-8",
                    where=repr(prefix + name),
                    remedy="rename the file",
                ) from None
            info = os.lstat(full)
            if stat.S_ISLNK(info.st_mode):
                _check_link(full, real_root)
                info = os.stat(full)
            if stat.S_ISREG(info.st_mode):
                yield prefix + name, info
            elif name.lower().endswith(PICTURE_EXTENSIONS):
                raise SourceError(
                    "a source is not a regular file",
                    where=prefix + name,
                    remedy="remove it from the input folder",
                )


def _check_link(full: str, real_root: str) -> None:
    real = os.path.realpath(full)
    if not os.path.exists(real):
        raise SourceError(
            "a link leads nowhere", where=full, remedy="remove it from the input folder"
        )
    if os.path.commonpath([real, real_root]) != real_root:
        raise SourceError(
            "a link leads out of the input folder",
            where=full,
            found=real,
            remedy="copy what it points to into the folder",
        )


def path_inside(root: Path, path: str) -> str:
    """Where `path` lies below `root`, links resolved. Raises SourceError where that is outside."""
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise SourceError("a path leads out of the input folder", where=repr(path))
    real_root = _real_root(os.path.abspath(root))
    target = os.path.join(real_root, path)
    parts = path.split("/")
    if not any(
        os.path.islink(os.path.join(real_root, *parts[:count]))
        for count in range(1, len(parts) + 1)
    ):
        return target  # as nearly every path: no link between it and the root, nothing to resolve
    real = os.path.realpath(target)
    if os.path.commonpath([real, real_root]) != real_root:
        raise SourceError("a link leads out of the input folder", where=target, found=real)
    return real


@lru_cache(maxsize=16)
def _real_root(root: str) -> str:
    return os.path.realpath(root)


def _recognise(
    root: Path, pictures: tuple[str, ...], others: tuple[str, ...], wanted: str, warnings: list[str]
) -> tuple[str, tuple[str, ...]]:
    """(format, its annotation files)."""
    found = {
        "voc": _stem_files(pictures, others, ".xml"),
        "coco": _coco_files(root, others, wanted == "coco"),
        "yolo": _stem_files(pictures, others, ".txt"),
    }
    if wanted == "masks":
        found[wanted] = tuple(path for path in others if path.lower().endswith(PICTURE_EXTENSIONS))
    if wanted in {"folder", "classes"}:
        return wanted, ()
    if wanted != "auto":
        if not found[wanted]:
            raise SourceError(
                f"no {wanted} annotations found",
                where=root,
                expected=LOOKED_FOR[wanted],
                remedy="check --build.input_root, or choose another --build.format (folder has no boxes)",
            )
        return wanted, found[wanted]
    # Annotations that pair with no picture at all (a README.txt in labels/) do not make a format.
    seen = [
        kind
        for kind, files in found.items()
        if files and (kind == "coco" or pair_by_stem(pictures, files).annotation_of)
    ]
    if not seen:
        seen = [kind for kind, files in found.items() if files]
    if len(seen) > 1:
        raise SourceError(
            "annotations of more than one format",
            where=root,
            found=" and ".join(seen),
            remedy=f"choose one with --build.format {seen[0]}",
        )
    if not seen:
        warnings.append(
            "no annotations recognised: taken as a plain folder of pictures without boxes (--build.format folder)"
        )
        log.warning(warnings[-1])
        return "folder", ()
    log.info("format: %s, for %d of %s", seen[0], len(found[seen[0]]), LOOKED_FOR[seen[0]])
    return seen[0], found[seen[0]]


def _stem_files(
    pictures: tuple[str, ...], others: tuple[str, ...], extension: str
) -> tuple[str, ...]:
    beside = {posixpath.dirname(path) for path in pictures}
    stems = {posixpath.splitext(posixpath.basename(path))[0] for path in pictures}
    chosen = []
    for path in others:
        folder, name = posixpath.split(path)
        if not name.lower().endswith(extension):
            continue
        if NOT_LABELS.match(name) and posixpath.splitext(name)[0] not in stems:
            continue
        if folder in beside or in_annotation_folder(path):
            chosen.append(path)
    return tuple(chosen)


def _coco_files(root: Path, others: tuple[str, ...], any_json: bool) -> tuple[str, ...]:
    named = [path for path in others if COCO_NAME.match(posixpath.basename(path))]
    instances = {
        posixpath.dirname(path)
        for path in named
        if posixpath.basename(path).startswith("instances_")
    }
    # Beside COCO's own instances_*.json lie captions and keypoints of the same pictures.
    named = [
        path
        for path in named
        if posixpath.dirname(path) not in instances
        or posixpath.basename(path).startswith("instances_")
    ]
    if not named and any_json:
        named = [
            path
            for path in others
            if path.lower().endswith(".json") and _looks_like_coco(root / path)
        ]
    return tuple(named)


def _looks_like_coco(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b'"images"' in file.read(1 << 20)
    except OSError:
        return False


def _may_name_classes(path: str) -> bool:
    name = posixpath.basename(path)
    return bool(NAMES_FILE.match(name)) or (
        "/" not in path and name.lower().endswith((".yaml", ".yml"))
    )
