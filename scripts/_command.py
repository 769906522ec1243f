"""How all commands run: `utils.argyaml.run` with the sections of all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from scripts._sections import SECTION_NAMES, all_sections
from utils import argyaml
from utils.config.sections import CommandSettings, KnownSections

__all__ = ["KNOWN", "run"]

SettingsT = TypeVar("SettingsT", bound=CommandSettings)
KNOWN = KnownSections(SECTION_NAMES, all_sections)


def run(
    main: Callable[[SettingsT], Mapping[str, object]],
    settings: type[SettingsT],
    doc: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """`utils.argyaml.run` with the sections of all commands."""
    return argyaml.run(main, settings, doc, argv=argv, known=KNOWN)
