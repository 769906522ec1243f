"""python tests/support/code_metrics.py [ROOT ...] [--json]

Measures how the product code reads: line lengths, comments, sizes, types and settings. With
several roots, such as two checkouts, their figures stand side by side.

Everything is read from the source text; nothing is imported, so that a checkout of any age can
be measured by any Python that parses it. Shares are over non-blank lines.
"""

# ruff: noqa: T201 - what this program prints is its result.

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from source_counts import (
    LONG_FUNCTION,
    comment_lines,
    count_any,
    count_array_any,
    count_dict_any,
    getattr_defaults,
    hasattr_hooks,
    long_functions,
    public_annotations,
    read_sources,
    settings_fields,
    skipped_formats,
)

PACKAGES = (
    "warehouse",
    "ingest",
    "utils",
    "detector",
    "vqvae",
    "features",
    "segmentation",
    "scripts",
)

# The settings of the benchmarks are a section of config.yaml like any other.
SETTINGS_PACKAGES = (*PACKAGES, "benchmarks")

LONG_LINE = 100


@dataclass(frozen=True)
class CodeMetrics:
    """The figures of one root. Lists name what was counted, so that it can be found and mended."""

    mean_length: float
    over_100: float
    comments: float
    fmt_skip: int
    biggest_file: str
    biggest_lines: int
    long_functions: list[str]
    any_in_signatures: int
    any_in_arrays: int
    dict_any_in_signatures: int
    settings: int
    settings_without_description: int
    undescribed_settings: list[str]
    hasattr_hooks: int
    hooks: list[str]
    getattr_defaults: int
    lines: int
    non_blank_lines: int
    files: int
    package_lines: dict[str, int]


def measure(root: Path) -> CodeMetrics:
    """Measure the product packages below `root`.

    Parameters
    ----------
    root : Path
        A checkout of the repository. Packages that it does not have are left out.

    Returns
    -------
    CodeMetrics
        Shares are fractions of the non-blank lines, lengths are characters.

    Raises
    ------
    ValueError
        When `root` holds no Python file in any of the packages.
    """
    sources = list(read_sources(root, PACKAGES))
    if not sources:
        raise ValueError(f"{root}: no Python file in {', '.join(PACKAGES)}; give a checkout's root")

    non_blank = [line for source in sources for line in source.lines if line.strip()]
    biggest = max(sources, key=lambda source: len(source.lines))
    annotations = [note for source in sources for note in public_annotations(source.tree)]
    fields = list(settings_fields(list(read_sources(root, SETTINGS_PACKAGES))))
    undescribed = [name for name, described in fields if not described]
    hooks = [hook for source in sources for hook in hasattr_hooks(source)]

    return CodeMetrics(
        mean_length=sum(map(len, non_blank)) / len(non_blank),
        over_100=sum(len(line) > LONG_LINE for line in non_blank) / len(non_blank),
        comments=sum(comment_lines(source.text) for source in sources) / len(non_blank),
        fmt_skip=sum(skipped_formats(source.text) for source in sources),
        biggest_file=biggest.name,
        biggest_lines=len(biggest.lines),
        long_functions=[name for source in sources for name in long_functions(source)],
        any_in_signatures=sum(map(count_any, annotations)),
        any_in_arrays=sum(map(count_array_any, annotations)),
        dict_any_in_signatures=sum(map(count_dict_any, annotations)),
        settings=len(fields),
        settings_without_description=len(undescribed),
        undescribed_settings=undescribed,
        hasattr_hooks=len(hooks),
        hooks=hooks,
        getattr_defaults=sum(getattr_defaults(source.tree) for source in sources),
        lines=sum(len(source.lines) for source in sources),
        non_blank_lines=len(non_blank),
        files=len(sources),
        package_lines={
            package: total
            for package in PACKAGES
            if (total := sum(len(each.lines) for each in sources if each.package == package))
        },
    )


def table_rows(metrics: CodeMetrics) -> dict[str, str]:
    """Return the printed figures in order, keyed by what they say."""
    rows = {
        "mean length of non-blank lines": f"{metrics.mean_length:.1f}",
        f"lines over {LONG_LINE} characters": f"{metrics.over_100:.2%}",
        "comment lines": f"{metrics.comments:.2%}",
        "fmt: skip": f"{metrics.fmt_skip}",
        "lines of the biggest file": f"{metrics.biggest_lines}",
        f"functions over {LONG_FUNCTION} lines": f"{len(metrics.long_functions)}",
        "Any in public signatures": f"{metrics.any_in_signatures}",
        "  of which in NDArray[Any], dtype[Any]": f"{metrics.any_in_arrays}",
        "  of which in dict[str, Any]": f"{metrics.dict_any_in_signatures}",
        "settings (benchmarks included)": f"{metrics.settings}",
        "settings without description": f"{metrics.settings_without_description}",
        "hasattr hooks": f"{metrics.hasattr_hooks}",
        "getattr with a default": f"{metrics.getattr_defaults}",
        "product files": f"{metrics.files:,}",
        "product lines": f"{metrics.lines:,}",
    }
    for package in PACKAGES:
        rows[f"  {package}"] = f"{metrics.package_lines.get(package, 0):,}"
    return rows


def print_table(roots: Sequence[Path], measured: Sequence[CodeMetrics]) -> None:
    columns = [table_rows(metrics) for metrics in measured]
    if len(roots) > 1:
        print(" " * 42 + "".join(f"{root.resolve().name[-11:]:>12}" for root in roots))
    for label in columns[0]:
        print(f"{label:<42}" + "".join(f"{column[label]:>12}" for column in columns))

    for root, metrics in zip(roots, measured, strict=True):
        print(f"\n{root}: biggest file {metrics.biggest_file}")
        print_list("functions that are too long", metrics.long_functions)
        print_list("hasattr hooks", metrics.hooks)
        print_list("settings without description", metrics.undescribed_settings)


def print_list(title: str, names: Iterable[str], most: int = 40) -> None:
    every = list(names)
    if not every:
        return
    print(f"{title}:")
    for name in every[:most]:
        print(f"  {name}")
    if len(every) > most:
        print(f"  ... and {len(every) - most} more; --json lists all")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure how the product code reads.")
    here = Path(__file__).resolve().parents[2]
    parser.add_argument("roots", nargs="*", type=Path, default=[here], metavar="ROOT")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each root")
    options = parser.parse_args(argv)

    try:
        measured = [measure(root) for root in options.roots]
    except (ValueError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    if options.json:
        for root, metrics in zip(options.roots, measured, strict=True):
            print(json.dumps({"root": str(root), **asdict(metrics)}))
    else:
        print_table(options.roots, measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
