"""A config file as sections of plain values.

Purpose: `read_yaml`, the only place that reads YAML.
Used by: utils.argyaml
Design notes: safe YAML, in which a key may stand only once, aliases are refused (nested ones can
  expand to gigabytes), and `1e-4` is a number, as everyone but YAML 1.1 expects.
Assistant guidance: when extending: whatever a file holds ends in a ConfigError with file and line,
  never in a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from utils.config.sections import nearest
from warehouse.errors import ConfigError

__all__ = ["read_yaml"]

MAX_CONFIG_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases and without repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise ConfigError(
                "aliases are not allowed in a config file",
                where=f"line {event.start_mark.line + 1}",
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            line = f"line {key_node.start_mark.line + 1}"
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise ConfigError("a key must be a plain word or number", where=line)
            if key in seen:
                raise ConfigError(
                    f"key {key!r} stands twice", where=line, remedy="keep one of them"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a float, so that 1e-4 would be a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path, known: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The sections of a config file, as plain values by key.

    Parameters
    ----------
    path
        A YAML file of at most 1 MiB.
    known
        The names that sections may have.

    Raises
    ------
    ConfigError
        Naming file and line, for anything that is not known sections of keys.
    """
    data = _parse(_read_text(path), path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            "the config file is not a mapping of sections",
            where=path,
            expected="build: ..., loader: ...",
            found=type(data).__name__,
        )
    for name, values in data.items():
        if name not in known:
            raise ConfigError(f"unknown section {name!r}{nearest(str(name), known)}", where=path)
        if values is not None and not isinstance(values, dict):
            raise ConfigError(
                f"section {name!r} is not a mapping of keys",
                where=path,
                found=type(values).__name__,
            )
    return {name: values or {} for name, values in data.items()}


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                "the config file is too large",
                where=path,
                expected=f"at most {MAX_CONFIG_BYTES} bytes",
                found=size,
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the config file cannot be read",
            where=path,
            found=_reason(error),
            remedy="give the path of a YAML file, such as config.yaml",
        ) from None


def _parse(text: str, path: Path) -> Any:
    what = "the config file does not parse"
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(what, where=f"{path}, line {line}", found=error.problem) from None
    except yaml.YAMLError as error:
        raise ConfigError(what, where=path, found=str(error)) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{path}, {error.where}", remedy=error.remedy) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(what, where=path, found=_reason(error)) from None


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
