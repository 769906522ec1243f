"""The known layouts, and which of them a published version has.

A new layout is a subclass of `Layout` in a file of its own and an entry here. A layout of several
files has a folder, as cubes do.
"""

from __future__ import annotations

from warehouse.errors import CorruptError
from warehouse.format.manifest import Manifest
from warehouse.layouts.base import Layout
from warehouse.layouts.cube.layout import Cube
from warehouse.layouts.pictures import Pictures
from warehouse.layouts.rows import Rows

__all__ = ["LAYOUTS", "layout_of"]

# The first layout that recognises a manifest is taken, so `Rows`, which recognises any, is last.
LAYOUTS: dict[str, type[Layout]] = {each.name: each for each in (Cube, Pictures, Rows)}
"""The layouts by name, in the order in which a manifest is shown to them."""


def layout_of(manifest: Manifest) -> Layout:
    """Return the layout of a published version.

    Raises
    ------
    CorruptError
        If no layout recognises the manifest.
    """
    for layout in LAYOUTS.values():
        found = layout.of(manifest)
        if found is not None:
            return found

    raise CorruptError(
        "no known layout fits this version",
        where=manifest.version,
        expected=f"one of {', '.join(LAYOUTS)}",
        remedy="open it with the release that built it",
    )
