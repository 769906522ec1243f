"""Show a version to people: its numbers as tables for a terminal, and a sheet of its samples.

The layout knows what there is to tell; this module gives it its form. Pillow and rich are imported
when something is drawn or printed, since every build imports this module for its messages.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from warehouse.errors import BuildError
from warehouse.format import durable
from warehouse.layouts.tables import TextTable
from warehouse.read.version import Split, Warehouse
from warehouse.settings import InspectSettings

if TYPE_CHECKING:
    from PIL import Image
    from rich.table import Table

__all__ = ["manifest_tables", "rejected_lines", "write_contact_sheet"]


def rejected_lines(rejected: Sequence[Mapping[str, object]], most: int = 10) -> Iterable[str]:
    """Yield a line for each rejected source, at most `most`, and one on how many are left.

    Parameters
    ----------
    rejected
        The lines of rejected.jsonl: `kind`, `path`, `reason` and `detail` of each.
    most
        The number of sources that are listed.
    """
    # A folder of the wrong kind is rejected file by file: thousands of lines would hide the rest.
    for line in rejected[:most]:
        yield f"refused {line['kind']} {line['path']}: {line['reason']} {line['detail']}".rstrip()

    if len(rejected) > most:
        yield f"... and {len(rejected) - most} more lines in rejected.jsonl"


def manifest_tables(warehouse: Warehouse) -> Iterable[Table]:
    """Yield the tables of a version for a terminal: itself, its arrays or features, its splits."""
    for table in warehouse.layout.text_tables(warehouse.manifest):
        yield _rich_table(table)


def _rich_table(text: TextTable) -> Table:
    from rich.table import Table

    table = Table(*text.columns, title=text.title, show_header=bool(text.columns))
    for row in text.rows:
        table.add_row(*row)

    return table


def _draw_pictures(split: Split, count: int) -> Image.Image:
    from warehouse.inspect.picture_sheet import contact_sheet

    return contact_sheet(split, count)


def _draw_cube(split: Split, count: int) -> Image.Image:
    from warehouse.inspect.cube_sheet import cube_sheet

    return cube_sheet(split.warehouse, count)


SHEETS: dict[str, Callable[[Split, int], Image.Image]] = {
    "pictures": _draw_pictures,
    "cube": _draw_cube,
}
"""The functions that draw a split and a number of samples or tiles, by layout."""


def write_contact_sheet(warehouse: Warehouse, settings: InspectSettings) -> Path | None:
    """Draw and save a sheet of the images of a split, or of the features of a cube over time.

    Parameters
    ----------
    warehouse
        The version.
    settings
        The split, the number of images, and the file to write.

    Returns
    -------
    Path or None
        The file of the sheet; None for layouts with nothing to draw (codes, features).

    Raises
    ------
    StoreError
        If the version has no such split.
    BuildError
        If the file cannot be written.
    """
    split = warehouse.split(settings.split or warehouse.splits[0])
    draw = SHEETS.get(warehouse.layout.name)
    if draw is None:
        return None

    path = Path(settings.output or f"artifacts/inspect/{warehouse.version}_{split.name}.png")

    # Drawn into memory and written at once, so that a failure while drawing leaves an earlier sheet
    # as it was.
    buffer = io.BytesIO()
    draw(split, settings.pictures).save(buffer, "PNG")

    try:
        durable.write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise BuildError(
            "the contact sheet cannot be written",
            where=path,
            found=error.strerror,
            remedy="choose another --inspect.output",
        ) from None

    return path
