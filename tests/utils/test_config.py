"""Settings: layers, spelling, types; the file of defaults tells the truth."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.argyaml import SECTIONS, _load_model, load_settings, read_yaml
from warehouse.errors import ConfigError

ROOT = Path(__file__).parents[2]
BUILD = {"build": SECTIONS["build"]}


def load(*flags: str, text: str | None = None, tmp_path: Path | None = None) -> Any:
    if text is not None and tmp_path is not None:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        flags = ("--config", str(path), *flags)
    return load_settings("python -m scripts.build_zarr", flags, BUILD).build


@pytest.mark.parametrize("section", SECTIONS)
def test_config_yaml_holds_every_default(section: str) -> None:
    shown, model = read_yaml(ROOT / "config.yaml")[section], _load_model(SECTIONS[section])
    assert model(**shown).model_dump() == model().model_dump()
    assert list(shown) == list(model.model_fields) or set(shown) == set(model.model_fields)


def test_layers_the_later_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "build: {seed: 1, max_boxes: 2, pad_value: 3, max_invalid: 4}"
    monkeypatch.setenv("WAREHOUSE_BUILD__MAX_BOXES", "20")
    monkeypatch.setenv("WAREHOUSE_BUILD__PAD_VALUE", "30")
    build = load("--build.pad_value", "33", text=text, tmp_path=tmp_path)
    assert (build.seed, build.max_boxes, build.pad_value, build.max_invalid, build.max_missing) == (
        1,
        20,
        33,
        4,
        0,
    )


@pytest.mark.parametrize(
    ("name", "value", "key", "expected"),
    [
        ("WAREHOUSE_CLEAR", "1", "if_exists", "clear"),
        ("WAREHOUSE_SKIP_IF_EXISTS", "true", "if_exists", "skip"),
        ("WAREHOUSE_MAX_INVALID", "3", "max_invalid", 3),
        ("WAREHOUSE_MAX_MISSING", "4", "max_missing", 4),
        ("WAREHOUSE_MAX_EMPTY_RATIO", "0.5", "max_empty_ratio", 0.5),
        ("WAREHOUSE_TRACE", "false", "trace", False),
        ("WAREHOUSE_BUILD__TARGET_SIZE", "[64, 32]", "target_size", (64, 32)),
        ("WAREHOUSE_BUILD__SPLITS", '{"train": 1.0}', "splits", {"train": 1.0}),
        ("WAREHOUSE_BUILD__CLASSES", "null", "classes", None),
    ],
)
def test_environment_names(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, key: str, expected: Any
) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(load(), key) == expected


def test_mappings_and_lists_are_replaced_whole(tmp_path: Path) -> None:
    assert load(
        text="build: {splits: {train: 0.5, val: 0.5}, classes: [a]}", tmp_path=tmp_path
    ).splits == {"train": 0.5, "val": 0.5}
    assert load(
        "--build.classes", '["b"]', text="build: {classes: [a, c]}", tmp_path=tmp_path
    ).classes == ["b"]


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", ".1e-3", "0.0001"])
def test_a_number_in_exponent_form_is_a_number(tmp_path: Path, number: str) -> None:
    assert (
        load(text=f"build: {{max_empty_ratio: {number}}}", tmp_path=tmp_path).max_empty_ratio
        == 1e-4
    )


def test_a_switch_needs_no_value_and_null_is_none() -> None:
    build = load("--build.dry_run", "--build.workers", "null", "--build.group_pattern", "null")
    assert (build.dry_run, build.workers, build.group_pattern) == (True, None, None)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("build: {target_sise: [8, 8]}", "did you mean 'target_size'"),
        ("biuld: {seed: 1}", "did you mean 'build'"),
        ("build: {max_boxes: -1}", "max_boxes.*greater than or equal to 1.*-1"),
        ("build: {max_boxes: many}", "max_boxes.*integer.*many"),
        ("build: {target_size: [384]}", "target_size"),
        ("build: {target_size: [4, 384]}", "between 8 and 16384"),
        ("build: {splits: {train: 0.5}}", "add up to 1"),
        ("build: {splits: {dev: 1.0}}", "unknown split 'dev'"),
        ("build: {classes: [a, a]}", "distinct"),
        ("build: {group_pattern: '('}", "regular expression"),
        ("build: {max_empty_ratio: .nan}", "max_empty_ratio"),
        ("build:\n  seed: 1\n  seed: 2", "'seed' stands twice.*line 3"),
        ("build:\n  seed: [1", "line 2|line 3"),
        ("build: 3", "not a mapping of keys"),
        ("- build", "not a mapping of sections"),
        ("build: !!python/object/apply:os.system ['true']", "does not parse"),
        ("a: &a [1]\nb: [*a, *a]", "aliases"),
        ("build: {1: 2}", "unknown key"),
        ("build: {[1]: 2}", "plain word"),
        ("[" * 3000, "does not parse"),
    ],
)
def test_a_wrong_file_is_one_line_that_helps(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        load(text=text, tmp_path=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_a_config_that_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load("--config", path)


@pytest.mark.parametrize("value", ["[512", "{", '{"train": x}'])
def test_a_flag_that_does_not_parse_is_one_line(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("--build.splits" if "{" in value else "--build.target_size", value)
    assert "\n" not in str(caught.value)


def test_other_commands_sections_may_stand_in_the_file(tmp_path: Path) -> None:
    assert load(text="detector: {epochs: 3}\nbuild: {seed: 5}", tmp_path=tmp_path).seed == 5


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_as_config_are_settings_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load("--config", str(path))


SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_has_help_and_version(script: str) -> None:
    for flag, needle in (
        ("--help", f"usage: python -m scripts.{script}"),
        ("--version", "tensor-warehouse"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", f"scripts.{script}", flag],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert needle in done.stdout


def test_an_unknown_flag_is_argument_syntax_and_names_the_nearest() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.build_zarr", "--build.target_sise", "3"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert "did you mean '--build.target_size'" in done.stderr
    assert done.stdout == ""


def test_the_last_line_of_stdout_is_the_result(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "scripts.make_sample",
        "--sample.count",
        "2",
        "--sample.size",
        "[64, 64]",
        "--sample.output",
        str(tmp_path / "s"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout.splitlines()[-1]) == {"path": str(tmp_path / "s"), "count": 2}
    assert "next: python -m scripts.build_zarr" in done.stderr
