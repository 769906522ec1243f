"""Version lookup: which version folder a path means.

A root leads to the version that its CURRENT file names; a version folder or a manifest.json stands
for its own version. Given up: guessing a version where CURRENT is missing or damaged.
"""

from __future__ import annotations

from warehouse.errors import CorruptError, NotAWarehouseError
from warehouse.format import manifest as tables
from warehouse.format.location import Location, Remote

__all__ = ["find_version"]

BUILD_HINT = "build one with python -m scripts.build_zarr --build.input_root FOLDER"


def find_version(path: Location) -> Location:
    """Return the version folder that a root, a version folder or a manifest.json stands for.

    Raises
    ------
    NotAWarehouseError
        There is nothing at this path, or no published version.
    CorruptError
        CURRENT names no version, or one that is not there.
    """
    if path.name == tables.MANIFEST:
        path = path.parent

    if isinstance(path, Remote):
        if (path / tables.MANIFEST).size() is not None:
            return path
    elif (path / tables.MANIFEST).exists():
        return path
    elif not path.exists():
        raise NotAWarehouseError("no such warehouse", where=path, remedy=BUILD_HINT)

    current = path / tables.CURRENT
    if not _is_plain_file(current):
        raise NotAWarehouseError(
            "no published version here (no CURRENT file)", where=path, remedy=BUILD_HINT
        )
    # The file may hold anything: its name must not lead to another folder, nor fill a message.
    name = current.read_bytes()[:64].decode(errors="replace").strip()
    if not tables.VERSION_NAME.fullmatch(name):
        raise CorruptError(
            "CURRENT does not name a version",
            where=current,
            expected="v and 12 hex digits",
            found=f"{name!r}",
            remedy=BUILD_HINT,
        )
    if not _is_plain_file(path / name / tables.MANIFEST):
        raise CorruptError(
            "CURRENT names a version that is not there",
            where=current,
            found=name,
            remedy=BUILD_HINT,
        )
    return path / name


def _is_plain_file(path: Location) -> bool:
    if isinstance(path, Remote):
        return path.size() is not None
    # A link could lead out of the root.
    return path.is_file() and not path.is_symlink()
