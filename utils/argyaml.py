"""Settings in layers (defaults < config file < environment < flags) and the frame every command
runs in.

Purpose: `run(main, __doc__, build="warehouse.settings:BuildSettings")` turns a typed line into
  frozen settings, calls `main`, and turns what comes back into a JSON line and an exit code.
Used by: scripts.bench_loader, scripts.build_zarr, scripts.compress_zarr, scripts.export_summary,
  scripts.extract_features, scripts.finetune, scripts.infer_view, scripts.inspect_runs,
  scripts.inspect_zarr, scripts.make_sample, scripts.segment_patches, scripts.train_detector,
  scripts.train_head, scripts.train_vqvae, scripts.verify_zarr
Design notes: sections merge by key; lists and dicts are replaced whole. pydantic-settings reads
  flags and environment, this file merges, since its own deep merge would mix dict values of two
  layers. YAML is read here and nowhere else: safe, duplicate keys refused, `1e-4` a number.
  Sections of other commands may stand in the file; only the command's own are checked.
Assistant guidance: when extending: a new section goes into SECTIONS with the model it stands for;
  settings models live beside the code they configure; nothing a user types may end in a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import logging
import os
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, SettingsError

from utils.log import start_logging
from warehouse.errors import ConfigError, WarehouseError

__all__ = ["SECTIONS", "load_settings", "read_yaml", "run"]

SECTIONS = {
    "sample": "ingest.synthetic.settings:SampleSettings",
    "build": "warehouse.settings:BuildSettings",
    "raster": "ingest.rasters.settings:RasterSettings",
    "inspect": "warehouse.settings:InspectSettings",
    "verify": "warehouse.settings:VerifySettings",
    "export": "warehouse.settings:ExportSettings",
    "loader": "utils.loading.settings:LoaderSettings",
    "detector": "detector.settings:DetectorSettings",
    "infer": "detector.settings:InferSettings",
    "vqvae": "vqvae.settings:VqvaeSettings",
    "experiments": "utils.tracking.settings:ExperimentSettings",
    "compress": "vqvae.settings:CompressSettings",
    "runs": "utils.tracking.settings:RunsSettings",
    "features": "features.settings:FeatureSettings",
    "head": "features.settings:HeadSettings",
    "finetune": "features.settings:FinetuneSettings",
    "segment": "segmentation.settings:SegmentSettings",
    "bench": "benchmarks.settings:BenchSettings",
}
NAMED_ENV = {
    "WAREHOUSE_MAX_INVALID": ("build", "max_invalid"),
    "WAREHOUSE_MAX_MISSING": ("build", "max_missing"),
    "WAREHOUSE_MAX_EMPTY_RATIO": ("build", "max_empty_ratio"),
    "WAREHOUSE_TRACE": ("build", "trace"),
    "WAREHOUSE_STORE": ("loader", "store"),
    "WAREHOUSE_PREFETCH": ("loader", "prefetch"),
}
ENV_PREFIX = "WAREHOUSE_"
MAX_CONFIG_BYTES = 1 << 20


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("tensor-warehouse")
    except PackageNotFoundError:
        return "unknown (not installed)"


def run(
    main: Callable[[Any], dict[str, Any]],
    doc: str | None,
    *,
    argv: Sequence[str] | None = None,
    **sections: str,
) -> int:
    """Parse, call `main(settings)`, print its result as the last line of stdout (of several ranks,
    the first does); the exit code.

    sections: the command's own, as name="module:Class". Returns 0 done, 1 typed error (one line on
    stderr) or a result whose `ok` is false, 130 interrupted (SIGTERM too, so that nothing is left
    running); argument syntax exits 2 by argparse.
    """
    start_logging(logging.INFO if first_rank() else logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = main(load_settings(doc, sys.argv[1:] if argv is None else argv, sections))
    except WarehouseError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt as stop:
        print(f"interrupted; {str(stop) or 'run the same command again to go on'}", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        return 1
    sys.stderr.flush()
    if first_rank():
        print(json.dumps(result, allow_nan=False, default=str), flush=True)  # noqa: T201
    return 0 if result.get("ok", True) else 1


def first_rank() -> bool:
    """Whether this process speaks for its run.

    The only one, or the first of those torchrun started.
    """
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def load_settings(doc: str | None, argv: Sequence[str], sections: Mapping[str, str]) -> Any:
    """Frozen settings with one attribute a section.

    Raises ConfigError; argument syntax exits 2 and --help exits 0.
    """
    models = {name: _load_model(path) for name, path in sections.items()}
    fields: dict[str, Any] = {
        name: (model, Field(default_factory=model)) for name, model in models.items()
    }
    schema = create_model("Settings", __base__=BaseSettings, **fields)
    config, flags = _read_flags(schema, doc, list(argv), models)
    layers = [read_yaml(Path(config)) if config else {}, _read_environment(schema, models), flags]
    merged: dict[str, dict[str, Any]] = {name: {} for name in models}
    for layer in layers:
        for name, values in layer.items():
            if name in merged:
                merged[name].update(values)
    return types.SimpleNamespace(
        **{name: _validate(model, name, merged[name]) for name, model in models.items()}
    )


def _load_model(path: str) -> type[Any]:
    module, _, name = path.partition(":")
    return typing.cast("type[Any]", getattr(importlib.import_module(module), name))


def _read_flags(
    schema: Any, doc: str | None, argv: list[str], models: Mapping[str, type[Any]]
) -> tuple[str | None, dict[str, Any]]:
    lines = (doc or "").strip().split("\n", 1)
    command = re.match(r"python -m (\S+)", lines[0])
    known = [f"--{name}.{key}" for name, model in models.items() for key in model.model_fields]
    prog = f"python -m {command[1]}" if command else None
    text = lines[1].strip() if len(lines) > 1 else None
    parser = _Parser(
        known,
        prog=prog,
        description=text,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a YAML file with some or all sections and keys"
    )
    parser.add_argument("--version", action="version", version=f"tensor-warehouse {version()}")
    argv = _spell_out_booleans(argv, models)
    try:
        source: Any = CliSettingsSource(
            schema,
            cli_parse_args=argv,
            root_parser=parser,
            cli_parse_none_str="null",
            cli_hide_none_type=True,
            cli_avoid_json=True,
        )
        flags = {
            name: {key: None if value == [None] else value for key, value in values.items()}
            for name, values in source().items()
        }
    except SettingsError as error:
        raise ConfigError(
            "a flag does not parse",
            found=str(error),
            remedy="lists and mappings are JSON: --build.target_size '[384, 384]'",
        ) from None
    # `source` keeps only the sections; --config is looked up again in the same argument list.
    parsed, _ = parser.parse_known_args(argv)
    return parsed.config, flags


class _Parser(argparse.ArgumentParser):
    """argparse that names the nearest known flag."""

    def __init__(self, known: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.known = known

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            message += _nearest(flag, self.known)
        self.exit(2, f"error: {message}; see --help\n")


def _spell_out_booleans(argv: list[str], models: Mapping[str, type[Any]]) -> list[str]:
    """`--build.dry_run` alone means `--build.dry_run true`."""
    booleans = {
        f"--{name}.{key}"
        for name, model in models.items()
        for key, info in model.model_fields.items()
        if info.annotation is bool
    }
    out: list[str] = []
    for at, word in enumerate(argv):
        out.append(word)
        if word in booleans and (at + 1 == len(argv) or argv[at + 1].startswith("--")):
            out.append("true")
    return out


def _read_environment(schema: Any, models: Mapping[str, type[Any]]) -> dict[str, dict[str, Any]]:
    try:
        source: Any = EnvSettingsSource(
            schema, env_prefix=ENV_PREFIX, env_nested_delimiter="__", env_parse_none_str="null"
        )
        layer: dict[str, dict[str, Any]] = {name: dict(values) for name, values in source().items()}
    except Exception as error:
        raise ConfigError(
            "an environment variable does not parse", where=f"{ENV_PREFIX}*", found=str(error)
        ) from None
    for name, (section, key) in NAMED_ENV.items():
        if section in models and name in os.environ:
            layer.setdefault(section, {})[key] = os.environ[name]
    if "build" in models:
        # CLEAR is the stronger wish of the two, should both be set.
        for name, choice in (("WAREHOUSE_SKIP_IF_EXISTS", "skip"), ("WAREHOUSE_CLEAR", "clear")):
            if os.environ.get(name, "").lower() in {"1", "true", "yes", "on"}:
                layer.setdefault("build", {})["if_exists"] = choice
    return layer


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key may stand once, an alias may not be a bomb, and 1e-4 is a number."""

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
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise ConfigError(
                    "a key must be a plain word or number",
                    where=f"line {key_node.start_mark.line + 1}",
                )
            if key in seen:
                raise ConfigError(
                    f"key {key!r} stands twice",
                    where=f"line {key_node.start_mark.line + 1}",
                    remedy="keep one of them",
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a config file.

    Raises ConfigError with the file and line for anything that is not sections of keys.
    """
    remedy = "give the path of a YAML file, such as config.yaml"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                "the config file is too large",
                where=path,
                expected=f"at most {MAX_CONFIG_BYTES} bytes",
                found=path.stat().st_size,
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "the config file cannot be read", where=path, found=_reason(error), remedy=remedy
        ) from None
    try:
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(
            "the config file does not parse", where=f"{path}, line {line}", found=error.problem
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError("the config file does not parse", where=path, found=str(error)) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{path}, {error.where}", remedy=error.remedy) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            "the config file does not parse", where=path, found=_reason(error)
        ) from None
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
        if name not in SECTIONS:
            raise ConfigError(
                f"unknown section {name!r}{_nearest(str(name), list(SECTIONS))}", where=path
            )
        if values is not None and not isinstance(values, dict):
            raise ConfigError(
                f"section {name!r} is not a mapping of keys",
                where=path,
                found=type(values).__name__,
            )
    return {name: values or {} for name, values in data.items()}


def _validate(model: type[Any], section: str, values: dict[str, Any]) -> Any:
    try:
        return model(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (section, *first["loc"]))
        if first["type"] == "extra_forbidden":
            near = _nearest(str(first["loc"][-1]), list(model.model_fields))
            raise ConfigError(
                f"unknown key {key!r}{near}", remedy="config.yaml lists every key"
            ) from None
        found = f"{first['input']!r:.120}"
        raise ConfigError(
            f"setting {key!r} is wrong", expected=_expectation(first["msg"]), found=found
        ) from None


def _expectation(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return message[0].lower() + message[1:]


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else f" (known: {', '.join(sorted(known)[:12])})"


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
