"""The examples of docs/architecture.md are applied to a copy of the code, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = (
    "benchmarks",
    "detector",
    "features",
    "ingest",
    "scripts",
    "segmentation",
    "utils",
    "vqvae",
    "warehouse",
)
FENCE = re.compile(r'^```(python|diff)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A block of the page: a new file, a change of a file, or (without a path) a program."""

    language: str
    path: str
    text: str


def examples(section: str) -> list[Example]:
    return [Example(*found.groups(default="")) for found in FENCE.finditer(section)]


def sections() -> dict[str, str]:
    """The page's text below each third-level heading, by heading."""
    parts = re.split(r"^### (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def apply_change(folder: Path, example: Example) -> None:
    lines = example.text.splitlines()
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    path = folder / example.path
    source = path.read_text()
    assert source.count(before) == 1, f"{example.path} has not exactly once:\n{before}"
    path.write_text(source.replace(before, after))


def run(folder: Path, program: str) -> None:
    # From a file, so that worker processes can import it, and with the copy before the checkout.
    path = folder / "program.py"
    path.write_text(program)
    done = subprocess.run(
        [sys.executable, path],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name in PACKAGES:
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png")
        )
    return folder


def test_the_table_and_the_sections_name_the_same_extensions() -> None:
    page = PAGE.read_text()
    table = re.findall(r"^\| (an? [^|]+?) \|", page, flags=re.MULTILINE)
    titles = [title.lower() for title in sections()]
    assert [row.removesuffix(" of the rate report") for row in table] == titles


# One test, since later sections use versions that earlier ones have built.
def test_the_examples_of_the_page_work(copy: Path) -> None:
    programs = 0
    for title, section in sections().items():
        blocks = examples(section)
        assert blocks, f"no example in {title}"
        for example in blocks:
            if not example.path:
                run(copy, example.text)
                programs += 1
            elif example.language == "diff":
                apply_change(copy, example)
            else:
                path = copy / example.path
                assert not path.exists(), f"{example.path} is there already"
                path.write_text(example.text)
    assert programs >= len(sections())


def test_paths_that_the_page_names_exist() -> None:
    text = FENCE.sub("", PAGE.read_text())
    named = re.findall(r"`([\w/]+(?:\.py|\.yaml))`", text)
    in_examples = {example.path for example in examples(PAGE.read_text())}
    missing = [path for path in named if "/" in path and not (ROOT / path).exists()]
    assert not set(missing) - in_examples


def test_modules_and_functions_that_the_page_names_exist() -> None:
    text = FENCE.sub("", PAGE.read_text())
    for name in re.findall(r"`((?:warehouse|ingest|utils)(?:\.\w+)+)`", text):
        parts = name.split(".")
        # The last part may be a function or class of the module before it, or a folder.
        module = ROOT.joinpath(*parts)
        holder = ROOT.joinpath(*parts[:-1]).with_suffix(".py")
        defined = holder.is_file() and re.search(
            rf"^(?:def|class) {parts[-1]}\b", holder.read_text(), flags=re.MULTILINE
        )
        assert module.with_suffix(".py").is_file() or module.is_dir() or defined, name
