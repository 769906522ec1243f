"""Settings in layers (defaults, config file, environment, flags) and the frame of every command.

Purpose: `run(main, Settings, __doc__)` turns a typed line into frozen settings, calls `main`, and
  turns what comes back into a JSON line and an exit code.
Used by: scripts._command, scripts.bench_loader, scripts.build_zarr, scripts.compress_zarr,
  scripts.export_summary, scripts.extract_features, scripts.finetune, scripts.infer_view,
  scripts.inspect_runs, scripts.inspect_zarr, scripts.make_sample, scripts.segment_patches,
  scripts.train_detector, scripts.train_head, scripts.train_vqvae, scripts.verify_zarr
Design notes: a command declares the sections that it reads as a subclass of `CommandSettings` and
  receives an instance. pydantic-settings reads flags and environment; the layers are merged by
  utils.config.sections, since the library's own merge would mix mappings of two layers. The config
  file may hold sections of other commands; only the command's own are checked.
Assistant guidance: when extending: a new section goes into scripts/_sections.py; nothing that a
  user types may end in a traceback.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, create_model
from pydantic_settings import BaseSettings

from utils.config.environment import read_environment
from utils.config.flags import read_flags
from utils.config.sections import (
    CommandSettings,
    KnownSections,
    check_section,
    merge_section,
    section_models,
)
from utils.config.yaml_file import read_yaml
from utils.log import start_logging
from warehouse.errors import WarehouseError

__all__ = ["CommandSettings", "KnownSections", "load_settings", "run"]

SettingsT = TypeVar("SettingsT", bound=CommandSettings)


def run(
    main: Callable[[SettingsT], Mapping[str, object]],
    settings: type[SettingsT],
    doc: str | None,
    *,
    argv: Sequence[str] | None = None,
    known: KnownSections | None = None,
) -> int:
    """Read the settings, call `main`, and print its result as the last line of stdout.

    Where torchrun started several ranks, only the first one prints.

    Parameters
    ----------
    main
        The command: settings in, JSON values out. A result whose `ok` is false is a failure.
    settings
        The sections that the command reads.
    doc
        The command's docstring, for `--help`.
    argv
        The words after the command's name; those of this process when None.
    known
        The sections of all commands; only the command's own when None.

    Returns
    -------
    int
        The exit code: 0 if the command succeeded; 1 if it failed, or raised a `WarehouseError`,
        which is printed as one line on stderr; 130 if it was interrupted. Wrong argument syntax
        exits with 2.
    """
    start_logging(logging.INFO if is_first_rank() else logging.WARNING)
    # SIGTERM ends a command as Ctrl-C does, so that no worker is left running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        words = sys.argv[1:] if argv is None else argv
        result = main(load_settings(settings, doc, words, known=known))
    except WarehouseError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt as stop:
        reason = str(stop) or "run the same command again to resume it"
        print(f"interrupted; {reason}", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; there is nobody left to tell.
        return 1

    # The result must be the last line also where both streams go into one file.
    sys.stderr.flush()
    if is_first_rank():
        print(json.dumps(result, allow_nan=False, default=str), flush=True)  # noqa: T201
    return 0 if result.get("ok", True) else 1


def is_first_rank() -> bool:
    """Return whether this process is the only one of its run, or the first of torchrun's."""
    # From the environment, since the ranks have not joined their process group yet when logging
    # starts; asking torch would also cost every command its import.
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def load_settings(
    settings: type[SettingsT],
    doc: str | None,
    argv: Sequence[str],
    *,
    known: KnownSections | None = None,
) -> SettingsT:
    """Return the settings of a command: defaults, then config file, environment and flags.

    A later layer wins. The parameters are those of `run`.

    Raises
    ------
    ConfigError
        For anything wrong in a layer. Wrong argument syntax exits with 2, `--help` with 0.
    """
    models = section_models(settings)
    known = known or KnownSections()
    fields: dict[str, Any] = {
        name: (model, Field(default_factory=model)) for name, model in models.items()
    }
    # pydantic-settings wants one model of its own kind, while a command's settings stay a plain
    # model that tests and notebooks can construct without any environment being read.
    schema = create_model("Settings", __base__=BaseSettings, **fields)

    config, flags = read_flags(schema, doc, argv, models)
    names = sorted({*known.names, *models})
    # From the weakest to the strongest, each with its name for messages.
    layers = [
        (str(config), read_yaml(Path(config), names) if config else {}),
        ("the environment", read_environment(schema, models, known)),
        ("the command line", flags),
    ]

    sections = {}
    for name, model in models.items():
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for origin, layer in layers:
            section = layer.get(name, {})
            values = merge_section(model, values, section)
            # Where two layers set parts of one setting, the later one is named.
            origins |= {str(key): origin for key in section}
        sections[name] = check_section(model, name, values, origins)
    return settings(**sections)
