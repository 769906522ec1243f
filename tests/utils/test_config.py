"""Settings: layers, spelling, types; the file of defaults tells the truth."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from scripts._command import KNOWN
from scripts._sections import SECTION_NAMES, all_sections
from scripts.build_zarr import Settings
from utils.argyaml import load_settings
from utils.config.sections import nested_model
from utils.config.yaml_file import read_yaml
from warehouse.errors import ConfigError

ROOT = Path(__file__).parents[2]
SECTIONS = all_sections()


@pytest.fixture(autouse=True)
def only_the_environment_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WAREHOUSE_")]:
        monkeypatch.delenv(name)


def load(*flags: str, text: str | None = None, tmp_path: Path | None = None) -> Any:
    if text is not None and tmp_path is not None:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        flags = ("--config", str(path), *flags)
    return load_settings(Settings, "python -m scripts.build_zarr", flags, known=KNOWN).build


@pytest.mark.parametrize("section", SECTIONS)
def test_config_yaml_holds_every_default(section: str) -> None:
    shown, model = read_yaml(ROOT / "config.yaml", SECTION_NAMES)[section], SECTIONS[section]
    assert model(**shown).model_dump() == model().model_dump()
    assert list(shown) == list(model.model_fields) or set(shown) == set(model.model_fields)


def fields_of(model: type[BaseModel], path: str) -> Iterator[tuple[str, str | None]]:
    """Path and description of every key, also of the models within a model."""
    for key, field in model.model_fields.items():
        yield f"{path}.{key}", field.description
        inner = nested_model(model, key)
        if inner is not None:
            yield from fields_of(inner, f"{path}.{key}")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_has_a_description_that_is_a_phrase(section: str) -> None:
    for path, text in fields_of(SECTIONS[section], section):
        assert text, path
        assert text.endswith("."), path
        assert len(text.split()) >= 3, path


@pytest.mark.parametrize("section", SECTIONS)
def test_config_yaml_explains_each_key_with_its_description(section: str) -> None:
    text = (ROOT / "config.yaml").read_text()
    words = " ".join(text.replace("\n", " ").replace("#", " ").split())
    for path, description in fields_of(SECTIONS[section], section):
        if not path.startswith("raster.features."):
            assert description in words, path


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
        ("WAREHOUSE_TRACE", "0", "trace", False),
        ("WAREHOUSE_TRACE", "true", "trace", True),
        ("WAREHOUSE_TRACE", "out/trace.jsonl", "trace", "out/trace.jsonl"),
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


def load_raster(tmp_path: Path, text: str, *flags: str) -> Any:
    path = tmp_path / "some.yaml"
    path.write_text(text)
    words = ["--config", str(path), *flags]
    return load_settings(Settings, "python -m scripts.build_zarr", words, known=KNOWN).raster


def test_models_within_a_section_merge_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "raster: {chunk: {time: 4, y: 64, x: 128}, time: {format: '%Y'}}"
    raster = load_raster(tmp_path, text, "--raster.chunk.time", "2")
    assert (raster.chunk.time, raster.chunk.y, raster.chunk.x) == (2, 64, 128)
    assert raster.time.format == "%Y"

    monkeypatch.setenv("WAREHOUSE_RASTER__CHUNK__Y", "16")
    raster = load_raster(tmp_path, text, "--raster.chunk.time", "2")
    assert (raster.chunk.time, raster.chunk.y, raster.chunk.x) == (2, 16, 128)


def test_a_key_within_a_section_leaves_the_defaults_beside_it(tmp_path: Path) -> None:
    raster = load_raster(tmp_path, "build: {seed: 1}", "--raster.chunk.time", "2")
    assert (raster.chunk.time, raster.chunk.y, raster.chunk.x) == (2, 32, 32)
    raster = load_raster(tmp_path, "raster: {chunk: {y: 64}}", "--raster.chunk.feature", "null")
    assert (raster.chunk.y, raster.chunk.x, raster.chunk.feature) == (64, 32, None)


def test_an_unknown_key_within_a_section_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'raster\.chunk\.tme'.*did you mean 'time'"):
        load_raster(tmp_path, "raster: {chunk: {tme: 2}}")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("WAREHOUSE_BUILD__SEDE", "WAREHOUSE_BUILD__SEED"),
        ("WAREHOUSE_BIULD__SEED", "WAREHOUSE_BUILD__SEED"),
        ("WAREHOUSE_BUILD_SEED", "WAREHOUSE_BUILD__SEED"),
        ("WAREHOUSE_DETECTOR__EPOCH", "WAREHOUSE_DETECTOR__EPOCHS"),
        ("WAREHOUSE_RASTER__CHUNK__TIMES", "WAREHOUSE_RASTER__CHUNK__TIME"),
        ("WAREHOUSE_CLAER", "WAREHOUSE_CLEAR"),
        ("WAREHOUSE_PREFECH", "WAREHOUSE_PREFETCH"),
    ],
)
def test_a_misspelt_environment_variable_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"{name}', did you mean '{meant}'") as caught:
        load()
    assert "\n" not in str(caught.value)


def test_an_environment_variable_of_another_program_is_a_warning_of_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WAREHOUSE_HOMEPAGE", "x")
    with caplog.at_level(logging.WARNING):
        assert load().seed == 0
    (line,) = caplog.messages
    assert "WAREHOUSE_HOMEPAGE" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "name",
    [
        "WAREHOUSE_DETECTOR__EPOCHS",
        "WAREHOUSE_EXPERIMENTS__DB",
        "WAREHOUSE_RASTER__CHUNK__TIME",
        "WAREHOUSE_STORE",
        "warehouse_vqvae__seed",
    ],
)
def test_an_environment_variable_of_another_command_is_no_mistake(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with caplog.at_level(logging.WARNING):
        assert load().seed == 0
    assert caplog.messages == []


def test_an_environment_variable_may_set_a_part_of_a_mapping(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WAREHOUSE_BUILD__SPLITS__TRAIN", "1.0")
    assert load().splits == {"train": 1.0}


def test_the_names_of_sections_are_those_of_the_table() -> None:
    assert tuple(all_sections()) == SECTION_NAMES


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


SCRIPTS = sorted(
    path.stem for path in (ROOT / "scripts").glob("*.py") if not path.stem.startswith("_")
)


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_torch(script: str) -> None:
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('scripts.{script}', run_name='__main__')\n"
        "except SystemExit:\n"
        "    print('loaded:', *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split("loaded:")[1].split())
    heavy = {"torch", "dask", "distributed", "zarr", "cv2", "matplotlib", "transformers"}
    assert not loaded & heavy


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


def test_a_wrong_setting_is_named_with_where_it_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown key 'build\.sede': .*\.yaml; did you mean 'seed'\?"
    ):
        load(text="build: {sede: 1}", tmp_path=tmp_path)
    with pytest.raises(ConfigError, match=r"'build\.seed' is wrong: the command line"):
        load("--build.seed", "-1", text="build: {seed: 1}", tmp_path=tmp_path)
    monkeypatch.setenv("WAREHOUSE_BUILD__SEED", "-2")
    with pytest.raises(ConfigError, match=r"'build\.seed' is wrong: the environment"):
        load(text="build: {seed: 1}", tmp_path=tmp_path)
