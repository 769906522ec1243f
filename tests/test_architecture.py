"""The architecture as a table: who may import whom, and what every file says about itself.

`docs/architecture.md` draws the same picture. Every import counts, also one inside a function or in
an `__init__` file; only imports for type checkers do not, since they never run.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each package and what it may import: arrows point down only.
PACKAGES = {
    "scripts": "detector vqvae features segmentation benchmarks utils ingest warehouse",
    "benchmarks": "utils ingest warehouse",
    "detector": "utils warehouse",
    "vqvae": "utils warehouse",
    "features": "utils warehouse",
    "segmentation": "utils warehouse",
    "utils": "warehouse",
    "ingest": "warehouse",
    "warehouse": "",
}

# The inside of the packages with sub-packages, from top to bottom. An entry may import what stands
# in a lower row, and nothing of its own row.
LAYERS = {
    "warehouse": [
        "inspect",
        "read  write",
        "layouts",
        "format",
        "settings",
        "section",
        "errors",
    ],
    "ingest": [
        "building",
        "jobs",
        "rasters  text",
        "pictures",
        "records",
        "sources",
        "synthetic",
    ],
    "utils": [
        "augment  jobs  loader  argyaml",
        "training  samplers",
        "caching",
        "loading  tracking",
        "loader_utils  config",
        "log",
    ],
}

# Folders of files that are alike by design: commands, annotation formats, measurements.
MANY_ENTRIES = {"scripts", "ingest.records", "benchmarks"}
# File names that several packages use for the same role. Any other name is used once.
SAME_ROLE = {
    "backbone",
    "base",
    "losses",
    "metrics",
    "model",
    "registry",
    "settings",
    "task",
    "training",
}
MOST_ENTRIES = 12
LONGEST_CHAIN = 6
MOST_LINES = 350
# What the data side must not import: it runs in builders and readers that train nothing.
NO_TORCH = ("warehouse", "ingest")
# What all commands share; no commands themselves.
SCRIPT_PARTS = ("scripts._command", "scripts._sections", "scripts._backbones")


def name_of(path: Path) -> str:
    """The module's dotted name; a package for its `__init__` file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}
FILES = [name for name, path in MODULES.items() if path.name != "__init__.py"]
UTILS = [name for name in FILES if name.startswith("utils.")]


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from running_nodes(node)


@cache
def imports(name: str, *, for_types: bool = False) -> frozenset[str]:
    """Every module that the file imports anywhere, other people's too; `.` for a relative one."""
    found: set[str] = set()
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree) if for_types else running_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.add(".")
                continue
            module = node.module or ""
            below = {f"{module}.{alias.name}" for alias in node.names}
            found |= {each if each in MODULES else module for each in below}
    return frozenset(found)


def own_imports(name: str) -> set[str]:
    """The modules of this project that a module imports."""
    return {each for each in imports(name) if each in MODULES and each != name}


def entries(package: str) -> dict[str, set[str]]:
    """What lies directly in a package ("" for the project) -> what of it that imports."""
    prefix = f"{package}." if package else ""

    def entry(module: str) -> str | None:
        if module == package:
            return "__init__"
        return (
            module[len(prefix) :].split(".", maxsplit=1)[0] if module.startswith(prefix) else None
        )

    graph: dict[str, set[str]] = {}
    for module in MODULES:
        start = entry(module)
        if start is None:
            continue
        ends = {entry(each) for each in own_imports(module)}
        graph.setdefault(start, set()).update(end for end in ends if end not in {None, start})
    return graph


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest path along the arrows. Fails when they form a cycle."""
    known: dict[str, list[str]] = {}

    def visit(entry: str, trail: tuple[str, ...]) -> list[str]:
        assert entry not in trail, "a cycle: " + " -> ".join((*trail, entry))
        if entry not in known:
            below = [visit(each, (*trail, entry)) for each in sorted(graph[entry])]
            known[entry] = [entry, *max(below, key=len, default=[])]
        return known[entry]

    return max((visit(entry, ()) for entry in graph), key=len, default=[])


LEVELS = ["", *(name for name, path in MODULES.items() if path.name == "__init__.py")]


@pytest.mark.parametrize("name", MODULES)
def test_arrows_between_packages_go_down_only(name: str) -> None:
    package = name.split(".", maxsplit=1)[0]
    used = {each.split(".")[0] for each in imports(name)} & {*PACKAGES, "tests", "examples"}
    assert used - {package} <= set(PACKAGES[package].split())


@pytest.mark.parametrize("package", LAYERS)
def test_arrows_inside_a_package_go_down_only(package: str) -> None:
    rows = {entry: row for row, line in enumerate(LAYERS[package]) for entry in line.split()}
    graph = entries(package)
    assert set(graph) - {"__init__", "deprecated"} == set(rows), "the table lists every entry"
    for start, ends in graph.items():
        for end in ends:
            assert rows.get(start, -1) < rows[end], f"{package}.{start} imports {package}.{end}"


@pytest.mark.parametrize("package", LEVELS)
def test_a_package_is_small_enough_to_be_seen_at_once(package: str) -> None:
    graph = entries(package)
    if package not in MANY_ENTRIES:
        assert len(set(graph) - {"__init__"}) <= MOST_ENTRIES
    chain = longest_chain(graph)
    assert len(chain) <= LONGEST_CHAIN, " -> ".join(chain)


def test_modules_form_no_cycle() -> None:
    longest_chain({name: own_imports(name) for name in MODULES})


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_its_own_package_s_init_or_relatively(name: str) -> None:
    assert "." not in imports(name)
    if name in FILES:
        own = {name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)}
        assert not own & imports(name), "import the submodule that defines it"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(NO_TORCH)])
def test_the_store_and_ingest_do_not_import_torch(name: str) -> None:
    assert not any(each.split(".")[0] == "torch" for each in imports(name))


def test_no_script_imports_a_script() -> None:
    for name in FILES:
        others = {each for each in own_imports(name) if each.startswith("scripts")}
        assert others <= set(SCRIPT_PARTS), name


@pytest.mark.parametrize("name", UTILS)
def test_utils_files_say_what_they_are_for_and_who_uses_them(name: str) -> None:
    doc = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
    if name.startswith("utils.deprecated."):
        assert doc.startswith("Deprecated")
        return
    for part in ("Purpose:", "Used by:", "Design notes:", "Assistant guidance: when extending"):
        assert part in doc, f"{part} is missing"
    users_named = doc.split("Used by:")[1].split("Design notes:")[0]
    listed = set(re.findall(r"[a-z_]+(?:\.[a-z_]+)+", users_named))
    # Here type checkers' imports count too: whoever reads the file wants to know of them.
    users = {other for other in MODULES if name in imports(other, for_types=True)}
    assert listed == users - {name}


@pytest.mark.parametrize("name", FILES)
def test_public_names_are_listed_once_and_exist(name: str) -> None:
    if name.startswith("scripts.") and name not in SCRIPT_PARTS:
        doc = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
        first = doc.split("\n")[0]
        message = "a script's first docstring line is the command that runs it"
        assert first.startswith(f"python -m {name}"), message
        return
    if name.startswith("utils.deprecated."):
        return
    module = importlib.import_module(name)
    assert all(hasattr(module, each) for each in module.__all__)


def test_a_file_name_is_used_once_or_for_one_role() -> None:
    names = [name.split(".")[-1] for name in FILES if not name.startswith("benchmarks.")]
    repeated = {name for name in names if names.count(name) > 1}
    assert repeated == SAME_ROLE


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short_enough_to_be_one_idea(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= MOST_LINES


def test_the_public_surface_is_the_design_s() -> None:
    import warehouse

    assert warehouse.__all__ == ["Warehouse", "WarehouseError"]


def modules_loaded_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return set(done.stdout.split())


def test_heavy_imports_wait_until_they_are_needed() -> None:
    """`build_zarr` must answer "already built" at once: no torch, dask, zarr or OpenCV by then."""
    code = "import scripts.build_zarr, ingest.records.list_sources, warehouse.write.publish"
    heavy = {"torch", "distributed", "dask", "zarr", "cv2", "matplotlib", "xarray"}
    assert not heavy & modules_loaded_by(code)


def test_importing_a_part_of_the_store_does_not_import_its_readers() -> None:
    assert "warehouse.read" not in modules_loaded_by("import warehouse.errors")
