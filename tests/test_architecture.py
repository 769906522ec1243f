"""The house's arrows.

Who may import whom, what lies in which room, what the files say about themselves.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "warehouse": set(),
    "ingest": {"warehouse"},
    "utils": {"warehouse"},
    "detector": {"utils", "warehouse"},
    "vqvae": {"utils", "warehouse"},
    "features": {"utils", "warehouse"},
    "segmentation": {"utils", "warehouse"},
    "benchmarks": {"utils", "ingest", "warehouse"},
    "scripts": {
        "detector",
        "vqvae",
        "features",
        "segmentation",
        "benchmarks",
        "utils",
        "ingest",
        "warehouse",
    },
}
NO_TORCH = ("warehouse", "ingest")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

UTILS = [
    path for path in MODULES if path.is_relative_to(ROOT / "utils") and path.name != "__init__.py"
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in the file, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {
                name for name in below if (ROOT / (name.replace(".", "/") + ".py")).is_file()
            }
            found |= submodules or {node.module}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level)
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_arrows_go_down_only(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imports(path)} & (set(PACKAGES) | {"tests"})
    assert ours - {package} <= PACKAGES[package]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_its_own_package_s_init_or_relatively(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = imports(path)
    assert not any(name.startswith(".") for name in names)
    if path.name != "__init__.py":
        assert not any(name == package for name in names), "import the submodule that defines it"


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parts[len(ROOT.parts)] in NO_TORCH], ids=name_of
)
def test_the_store_and_ingest_know_no_torch(path: Path) -> None:
    assert not any(name.split(".")[0] == "torch" for name in imports(path))


def test_no_script_imports_a_script() -> None:
    """Except for modules such as `_command`, which are what all commands share."""
    for path in (ROOT / "scripts").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("scripts")}
        assert all(name.startswith("scripts._") for name in ours), path.name


def test_there_are_no_cycles() -> None:
    graph = {
        name_of(path): {
            name for name in imports(path) if (ROOT / (name.replace(".", "/") + ".py")).is_file()
        }
        for path in MODULES
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for following in sorted(graph.get(name, ())):
                visit(following, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in MODULES
        if path.is_relative_to(ROOT / "utils") and path.name != "__init__.py"
    ],
    ids=name_of,
)
def test_utils_files_say_what_they_are_for_and_who_uses_them(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    for part in ("Purpose:", "Used by:", "Design notes:", "Assistant guidance: when extending"):
        assert part in doc, f"{part} is missing"
    listed = set(
        re.findall(r"[a-z_]+(?:\.[a-z_]+)+", doc.split("Used by:")[1].split("Design notes:")[0])
    )
    users = {
        name_of(other)
        for other in MODULES
        if any(
            name == name_of(path) or name.startswith(name_of(path) + ".") for name in imports(other)
        )
    }
    lazily = {
        f"scripts.{script.stem}"
        for script in (ROOT / "scripts").glob("*.py")
        if f'"{name_of(path)}:' in script.read_text()
    }
    assert listed == (users | lazily) - {name_of(path)}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of
)
def test_public_names_are_listed_once_and_exist(path: Path) -> None:
    if path.parent.name == "scripts" and not path.stem.startswith("_"):
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        assert first.startswith(f"python -m scripts.{path.stem}"), (
            "a script's first docstring line is the command that runs it"
        )
        return
    module = importlib.import_module(name_of(path))
    assert all(hasattr(module, name) for name in module.__all__)


def test_files_are_short_enough_to_be_one_idea() -> None:
    long = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in long.items() if count > 600} == {}


def test_the_public_surface_is_the_design_s() -> None:
    import warehouse

    assert warehouse.__all__ == ["Warehouse", "WarehouseError"]


def test_heavy_imports_wait_until_they_are_needed() -> None:
    """`build_zarr` must answer "already built" at once.

    No torch, dask, zarr or OpenCV on that way.
    """
    import subprocess
    import sys

    code = (
        "import sys, scripts.build_zarr, ingest.pictures.picture_plan, "
        "ingest.records.list_sources, warehouse.write.publish; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {"torch", "distributed", "dask", "zarr", "cv2", "matplotlib", "xarray"} & set(
        done.stdout.split()
    )
