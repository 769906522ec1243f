"""The base class of all settings sections, and how settings reach a version's recipe.

The name of a version is a hash of its recipe. A setting is part of the recipe unless a marker in
its type says otherwise: forgetting a marker costs a needless build, whereas with a list of what
counts, forgetting an entry would silently serve old data.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = [
    "ADDED_LATER",
    "NOT_CONTENT",
    "PICTURES_ONLY",
    "RECORDED_APART",
    "Marker",
    "Section",
]


class Marker(Enum):
    """What a setting has to do with the content of a version; see `Section.content`.

    A setting without a marker decides what a version holds, so that a new one that nobody thought
    about gives versions another name instead of serving old data.
    """

    NOT_CONTENT = "paths, speed and thresholds: no byte of a version depends on it"
    RECORDED_APART = "the recipe has what it decides in an entry of its own"
    PICTURES_ONLY = "has no meaning for cubes"
    ADDED_LATER = "younger than release 0.1: part of the recipe only where it is not the default"


NOT_CONTENT = Marker.NOT_CONTENT
RECORDED_APART = Marker.RECORDED_APART
PICTURES_ONLY = Marker.PICTURES_ONLY
ADDED_LATER = Marker.ADDED_LATER


class Section(BaseModel):
    """One section of `config.yaml`: frozen, unknown keys refused, checked on construction."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )

    def content(self, *, leave_out: Collection[Marker] = ()) -> dict[str, Any]:
        """The settings that decide what a version holds, as JSON values for its recipe.

        Parameters
        ----------
        leave_out
            Markers of further settings to leave out, beside `NOT_CONTENT` and `RECORDED_APART`.
        """
        without = {NOT_CONTENT, RECORDED_APART, *leave_out}
        content = {}
        for key, value in self.model_dump(mode="json").items():
            field = type(self).model_fields[key]
            if without & set(field.metadata):
                continue
            own = getattr(self, key)
            # Names of versions stay what they were before the setting existed.
            if ADDED_LATER in field.metadata and own == field.get_default():
                continue
            content[key] = _content_of(own, value, leave_out)
        return content


def _content_of(own: object, value: Any, leave_out: Collection[Marker]) -> Any:
    if isinstance(own, Section):
        return own.content(leave_out=leave_out)
    if isinstance(own, tuple) and isinstance(value, list):
        return [_content_of(*pair, leave_out) for pair in zip(own, value, strict=True)]
    return value
