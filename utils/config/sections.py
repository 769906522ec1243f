"""Sections as frozen models: which there are, how layers merge, how values are checked.

Purpose: `CommandSettings`, what a command declares and receives; `KnownSections`, the sections of
  all commands; `merge_section` and `check_section`, from layers of plain values to a model.
Used by: scripts._command, utils.argyaml, utils.config.environment, utils.config.flags,
  utils.config.yaml_file
Design notes: layers merge by key at every depth where the key is itself a model. Lists and mappings
  such as `build.splits` are values: the later layer replaces them whole, since shares of two layers
  would add up to more than 1.
Assistant guidance: when extending: settings models live beside the code that they configure.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from warehouse.errors import ConfigError
from warehouse.section import Section

__all__ = [
    "CommandSettings",
    "KnownSections",
    "check_section",
    "merge_section",
    "nearest",
    "nested_model",
    "section_models",
]

# Values come from YAML, the environment and flags; their types are known to `check_section` only.
Layer = dict[str, Any]
SectionT = TypeVar("SectionT", bound=Section)
MOST_LISTED = 12


class CommandSettings(BaseModel):
    """The base class of a command's settings: one field for each section that it reads.

    Examples
    --------
    >>> from warehouse.settings import BuildSettings
    >>> class Settings(CommandSettings):
    ...     build: BuildSettings
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True)
class KnownSections:
    """The sections of all commands.

    Parameters
    ----------
    names
        The names of all sections. They are cheap to look at, so a config file that holds the
        sections of other commands costs no imports.
    load
        Imports and returns the models by name. Called only where a name turns up that the command
        itself does not know.
    """

    names: Sequence[str] = ()
    load: Callable[[], Mapping[str, type[Section]]] = dict


def section_models(command: type[CommandSettings]) -> dict[str, type[Section]]:
    """Return the models of a command's sections by name."""
    models: dict[str, type[Section]] = {}
    for name, field in command.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        models[name] = model
    return models


def nested_model(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the model that the values of a key have, or None where they are plain values."""
    field = model.model_fields.get(key)
    if field is None:
        return None
    for each in (field.annotation, *get_args(field.annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def merge_section(model: type[BaseModel], low: Layer, high: Layer) -> Layer:
    """Merge two layers of one section; `high` wins.

    Parameters
    ----------
    model
        The section's model, which tells mappings that are values from models within models.
    low, high
        Plain values by key.
    """
    merged = dict(low)
    for key, value in high.items():
        inner = nested_model(model, key) if isinstance(value, dict) else None
        if inner is None:
            merged[key] = value
            continue
        # A layer may set one key of a model within a model. The other keys then keep their
        # defaults, which are those of this section and not those of the inner model's class.
        below = low.get(key)
        if not isinstance(below, dict):
            below = _default_values(model, key)
        merged[key] = merge_section(inner, below, value)
    return merged


def _default_values(model: type[BaseModel], key: str) -> Layer:
    default = model.model_fields[key].get_default(call_default_factory=True)
    return default.model_dump() if isinstance(default, BaseModel) else {}


def check_section(
    model: type[SectionT], name: str, values: Layer, origins: Mapping[str, str] | None = None
) -> SectionT:
    """Return the section's frozen model.

    Parameters
    ----------
    origins
        For each key, where its value was read, such as a file; for messages.

    Raises
    ------
    ConfigError
        If a key is unknown or its value is wrong; the message names the first such key.
    """
    try:
        return model(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        # One error a line: the commands promise a single line on stderr.
        first = error.errors()[0]

    key = ".".join(str(part) for part in (name, *first["loc"]))
    # A rule about several settings together has no key, and so no single origin.
    where = (origins or {}).get(str(first["loc"][0])) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        *path, last = first["loc"]
        known = list(_model_at(model, path).model_fields)
        near = difflib.get_close_matches(str(last), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"unknown key {key!r}", where=where, remedy=f"{hint}config.yaml lists every key"
        )
    raise ConfigError(
        f"setting {key!r} is wrong",
        where=where,
        expected=_expectation(first["msg"]),
        found=f"{first['input']!r:.120}",
    )


def _model_at(model: type[BaseModel], path: Sequence[int | str]) -> type[BaseModel]:
    for part in path:
        model = nested_model(model, str(part)) or model
    return model


def _expectation(message: str) -> str:
    # pydantic's prefixes would repeat what the error's own field "expected" says.
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return message[0].lower() + message[1:]


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the end of an error message about an unknown word: what was probably meant."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f", did you mean {near[0]!r}?"
    return f" (known: {', '.join(sorted(known)[:MOST_LISTED])})"
