"""`WAREHOUSE_*` environment variables as a layer of settings.

Purpose: `read_environment`, from variables to sections of plain values.
Used by: utils.argyaml
Design notes: WAREHOUSE_<SECTION>__<KEY> sets any key; a few variables have names of their own. A
  misspelt variable would otherwise be ignored without a word, so an unknown one is an error where
  it looks like a setting, and a warning where another program may own it.
Assistant guidance: when extending: a variable with a name of its own goes into NAMED.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_settings import BaseSettings, EnvSettingsSource

from utils.config.sections import KnownSections, nested_model
from utils.log import get_log
from warehouse.errors import ConfigError
from warehouse.section import Section

__all__ = ["read_environment"]

log = get_log(__name__)
PREFIX, DELIMITER = "WAREHOUSE_", "__"
NAMED = {
    "WAREHOUSE_MAX_INVALID": ("build", "max_invalid"),
    "WAREHOUSE_MAX_MISSING": ("build", "max_missing"),
    "WAREHOUSE_MAX_EMPTY_RATIO": ("build", "max_empty_ratio"),
    "WAREHOUSE_TRACE": ("build", "trace"),
    "WAREHOUSE_STORE": ("loader", "store"),
    "WAREHOUSE_PREFETCH": ("loader", "prefetch"),
}
CHOICES = {"WAREHOUSE_SKIP_IF_EXISTS": "skip", "WAREHOUSE_CLEAR": "clear"}
"""Switches that set build.if_exists; the later one wins where both are set."""
TRUE = frozenset({"1", "true", "yes", "on"})
LIKENESS = 0.7
"""A name without `__` that is at least so similar to a known one is taken for a misspelling."""


def read_environment(
    schema: type[BaseSettings], models: Mapping[str, type[Section]], known: KnownSections
) -> dict[str, dict[str, Any]]:
    """The values that the environment sets, by section and key.

    Parameters
    ----------
    schema
        The command's sections as one model with a field each.
    models
        The same sections by name.
    known
        The sections of all commands: a variable for another command is no mistake.

    Raises
    ------
    ConfigError
        For a value that does not parse, and for an unknown variable that looks like a setting.
    """
    _refuse_unknown(models, known)
    try:
        source = EnvSettingsSource(
            schema, env_prefix=PREFIX, env_nested_delimiter=DELIMITER, env_parse_none_str="null"
        )
        layer: dict[str, dict[str, Any]] = {name: dict(values) for name, values in source().items()}
    except Exception as error:
        raise ConfigError(
            "an environment variable does not parse", where=f"{PREFIX}*", found=str(error)
        ) from None
    for name, (section, key) in NAMED.items():
        if section in models and name in os.environ:
            layer.setdefault(section, {})[key] = os.environ[name]
    if "build" in models:
        for name, choice in CHOICES.items():
            if os.environ.get(name, "").lower() in TRUE:
                layer.setdefault("build", {})["if_exists"] = choice
    return layer


def _refuse_unknown(models: Mapping[str, type[Section]], known: KnownSections) -> None:
    named = NAMED.keys() | CHOICES.keys()
    unknown = [
        name
        for name in sorted(os.environ)
        if name.upper().startswith(PREFIX)
        and name.upper() not in named
        and not _is_setting(name, models)
    ]
    if not unknown:
        return
    # Only now, since the models of all commands take a while to import.
    everything = {**known.load(), **models}
    words = [*named, *_setting_names(everything)]
    for name in unknown:
        if not _is_setting(name, everything):
            _report(name, words)


def _is_setting(name: str, models: Mapping[str, type[BaseModel]]) -> bool:
    section, *path = name.lower().removeprefix(PREFIX.lower()).split(DELIMITER)
    model: type[BaseModel] | None = models.get(section)
    if model is None:
        return False
    for at, key in enumerate(path):
        if key not in model.model_fields:
            return False
        inner = nested_model(model, key)
        if inner is None:
            # A key below a mapping, such as WAREHOUSE_BUILD__SPLITS__TRAIN.
            return at + 1 == len(path) or "dict" in str(model.model_fields[key].annotation)
        model = inner
    return True


def _setting_names(models: Mapping[str, type[BaseModel]], prefix: str = PREFIX) -> Iterator[str]:
    for section, model in models.items():
        for key in model.model_fields:
            name = f"{prefix}{section}{DELIMITER}{key}".upper()
            yield name
            inner = nested_model(model, key)
            if inner is not None:
                yield from (f"{name}{DELIMITER}{each}".upper() for each in inner.model_fields)


def _report(name: str, words: list[str]) -> None:
    """Compared without the prefix, which all names share."""
    bare = {word.removeprefix(PREFIX): word for word in words}
    wanted = name.upper().removeprefix(PREFIX)
    looks_like_a_setting = DELIMITER in wanted
    cutoff = 0.0 if looks_like_a_setting else LIKENESS
    near = difflib.get_close_matches(wanted, bare, n=1, cutoff=cutoff)
    if not near:
        log.warning("environment variable %s is not known and has no effect", name)
        return
    raise ConfigError(
        f"unknown environment variable {name!r}, did you mean {bare[near[0]]!r}?",
        remedy="correct its name, or unset it",
    )
