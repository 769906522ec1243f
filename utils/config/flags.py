"""A command's line as a layer of settings, and its `--help`.

Purpose: `read_flags`, from words to sections of plain values.
Used by: utils.argyaml
Design notes: pydantic-settings turns the models into flags; argparse does the syntax, which exits
  with 2. An unknown flag is answered with the nearest known one.
Assistant guidance: when extending: values are not checked here but where all layers meet.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn, get_args

from pydantic import BaseModel
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from utils.config.sections import nearest
from warehouse.errors import ConfigError
from warehouse.section import Section

__all__ = ["read_flags"]


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest known flag."""

    def __init__(self, known: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.known = known

    def error(self, message: str) -> NoReturn:
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            flag = message.removeprefix(unknown).split()[0].split("=")[0]
            message += nearest(flag, self.known)
        self.exit(2, f"error: {message}; see --help\n")


def read_flags(
    schema: type[BaseSettings],
    doc: str | None,
    argv: Sequence[str],
    models: Mapping[str, type[Section]],
) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The value of `--config`, and the values of all other flags by section and key.

    Parameters
    ----------
    schema
        The sections as one model with a field each.
    doc
        The command's docstring: its first line is the usage, the rest the description.
    argv
        The words after the command's name.

    Raises
    ------
    ConfigError
        For a list or mapping that is not JSON. Wrong syntax exits with 2, `--help` with 0.
    """
    parser = _make_parser(doc, models)
    words = _spell_out_switches(list(argv), models)
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            schema,
            cli_parse_args=words,
            root_parser=parser,
            cli_parse_none_str="null",
            cli_hide_none_type=True,
            cli_avoid_json=True,
        )
        values = _without_wrapped_nulls(source())
    except SettingsError as error:
        raise ConfigError(
            "a flag does not parse",
            found=str(error),
            remedy="lists and mappings are JSON: --build.target_size '[384, 384]'",
        ) from None
    # `source` keeps only the sections; --config is looked up again in the same words.
    parsed, _ = parser.parse_known_args(words)
    return parsed.config, values


def _make_parser(doc: str | None, models: Mapping[str, type[Section]]) -> _Parser:
    # The first paragraph is the command to type, which may take two lines.
    first, _, rest = (doc or "").strip().partition("\n\n")
    command = re.match(r"python -m (\S+)", first)
    parser = _Parser(
        [f"--{path}" for path, _ in _keys(models)],
        prog=f"python -m {command[1]}" if command else None,
        description=rest.strip() or None,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file with some or all sections and keys"
    )
    parser.add_argument("--version", action="version", version=f"tensor-warehouse {_release()}")
    return parser


def _release() -> str:
    try:
        return version("tensor-warehouse")
    except PackageNotFoundError:
        return "unknown (not installed)"


def _keys(models: Mapping[str, type[BaseModel]]) -> Iterator[tuple[str, Any]]:
    for name, model in models.items():
        for key, field in model.model_fields.items():
            yield f"{name}.{key}", field.annotation


def _spell_out_switches(words: list[str], models: Mapping[str, type[Section]]) -> list[str]:
    """`--build.dry_run` alone means `--build.dry_run true`."""
    switches = {
        f"--{path}"
        for path, annotation in _keys(models)
        if bool in (annotation, *get_args(annotation)) and type(None) not in get_args(annotation)
    }
    spelled: list[str] = []
    for at, word in enumerate(words):
        spelled.append(word)
        alone = at + 1 == len(words) or words[at + 1].startswith("--")
        if word in switches and alone:
            spelled.append("true")
    return spelled


def _without_wrapped_nulls(values: Any) -> Any:
    """pydantic-settings gives `null` for a list as `[None]`."""
    if isinstance(values, dict):
        return {key: _without_wrapped_nulls(value) for key, value in values.items()}
    return None if values == [None] else values
