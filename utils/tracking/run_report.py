"""The experiment log as tables and curves.

Purpose: `chosen_runs`, `score` and `best_run` select and rank runs; `runs_table`, `compare_table`
  and `draw_runs` show them.
Used by: scripts.inspect_runs
Design notes: what is compared is what differs: settings that are the same in all runs are left out.
  A run's score is the best value of one metric of its `epoch` lines, its headline unless another is
  named; runs that lack the metric are not ranked.
Assistant guidance: when extending: read through utils.tracking.experiment_log only; drawing stays a
  lazy import.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

from rich.table import Table

from utils.tracking.experiment_log import ExperimentLog, RunRow
from utils.tracking.settings import RunsSettings
from warehouse.errors import ConfigError

__all__ = [
    "BestRun",
    "best_run",
    "chosen_runs",
    "compare_table",
    "draw_runs",
    "runs_table",
    "score",
]

Better = Literal["min", "max"]

SMALLER_IS_BETTER = re.compile(r"loss|error|rmse|mae|total|seconds|perplexity_gap")
COLUMNS = (
    "id",
    "trainer",
    "name",
    "state",
    "started",
    "took",
    "steps",
    "best",
    "data",
    "code",
    "host",
)
MOST_IN_LEGEND = 12
COLOURS = 10
"""In matplotlib's default cycle."""


def chosen_runs(experiments: ExperimentLog, settings: RunsSettings) -> list[RunRow]:
    """Return the rows of the runs to be listed, newest last.

    Raises
    ------
    ConfigError
        A run that is asked for by number does not exist.
    """
    rows = experiments.runs(trainer=settings.trainer, ids=settings.compare)
    missing = sorted(set(settings.compare or []) - {row["id"] for row in rows})
    if missing:
        raise ConfigError(
            f"there is no run {missing[0]}",
            where=experiments.path,
            remedy="list the runs and their numbers with: python -m scripts.inspect_runs",
        )
    return rows if settings.compare else rows[-settings.limit :]


def score(
    experiments: ExperimentLog, row: RunRow, metric: str | None, better: Better | None = None
) -> tuple[float, int] | None:
    """Return the best value of a run and its step.

    Parameters
    ----------
    metric
        None means the run's headline.
    better
        None means the direction of the headline, or a guess from the metric's name.

    Returns
    -------
    tuple or None
        Of equal values the earliest; None where the run does not have the metric.
    """
    name = metric or row["headline"]
    steps, values, _ = experiments.metric(row["id"], name)
    found = [
        (value, step) for value, step in zip(values, steps, strict=True) if not math.isnan(value)
    ]
    if not found:
        return None
    sign = 1 if (better or _direction(row, name)) == "max" else -1
    return max(found, key=lambda pair: (sign * pair[0], -pair[1]))


def _direction(row: RunRow, name: str) -> Better:
    if name == row["headline"]:
        return "max" if row["better"] == "max" else "min"
    return "min" if SMALLER_IS_BETTER.search(name) else "max"


class BestRun(TypedDict):
    """The best of several runs; `checkpoint` is null if none was kept."""

    id: int
    name: str
    metric: str
    value: float
    step: int
    checkpoint: str | None


def best_run(
    experiments: ExperimentLog,
    rows: Sequence[RunRow],
    metric: str | None,
    better: Better | None = None,
) -> BestRun | None:
    """Return the best of the runs.

    Parameters
    ----------
    metric
        None means the newest run's headline.

    Returns
    -------
    BestRun or None
        None where no run has the headline.

    Raises
    ------
    ConfigError
        No run has the metric that is named.
    """
    if not rows:
        return None
    name = metric or str(rows[-1]["headline"])
    direction = better or _direction(rows[-1], name)
    scored = []
    for row in rows:
        found = score(experiments, row, name, direction)
        if found is not None:
            scored.append((*found, row))
    if not scored:
        if metric is None:
            return None
        raise ConfigError(
            f"no run has the metric {metric!r}",
            where=experiments.path,
            expected="one of " + ", ".join(_epoch_metrics(experiments, rows)[:12]),
        )
    sign = 1 if direction == "max" else -1
    value, step, best = max(scored, key=lambda one: sign * one[0])
    kept = experiments.path.parent / f"exp_{best['id']}" / "checkpoints"
    return {
        "id": best["id"],
        "name": best["name"],
        "metric": name,
        "value": value,
        "step": step,
        "checkpoint": str(kept) if (kept / "checkpoint.json").is_file() else None,
    }


def _epoch_metrics(experiments: ExperimentLog, rows: Sequence[RunRow]) -> list[str]:
    """Names of all metrics of `epoch` lines, sorted."""
    names = {
        name
        for row in rows
        for kind, name in experiments.metric_names(row["id"])
        if kind == "epoch"
    }
    return sorted(names)


def runs_table(
    experiments: ExperimentLog,
    rows: Sequence[RunRow],
    metric: str | None,
    better: Better | None = None,
) -> Table:
    """Return a table with a row for each run."""
    table = Table(title=f"{len(rows)} runs in {experiments.path}")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        found = score(experiments, row, metric, better)
        best = ""
        if found is not None:
            best = f"{metric or row['headline']} {found[0]:.4g} @ {found[1]}"
        ended = row["ended"] or row["updated"]
        cells = (
            row["id"],
            row["trainer"],
            row["name"],
            row["state"],
            time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"])),
            f"{ended - row['started']:.0f} s",
            row["step"],
            best,
            row["data_version"] or "",
            _code(row),
            row["host"],
        )
        table.add_row(*map(str, cells))
    return table


def _code(row: RunRow) -> str:
    """Version and short commit, with "+" if tracked files differed from it."""
    version, commit = str(row["code_version"]), row["code_commit"]
    if not commit:
        return version
    return f"{version} {commit[:8]}" + ("+" if commit.endswith("+") else "")


def compare_table(
    experiments: ExperimentLog, rows: Sequence[RunRow], better: Better | None = None
) -> Table:
    """Return a table with a column for each run: settings that differ, then best metrics."""
    table = Table(title="settings that differ, and the best value of each metric")
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['id']} {row['name']}")

    params = [experiments.params(row["id"]) for row in rows]
    for name in sorted(set().union(*params)):
        values = [json.dumps(each[name]) if name in each else "" for each in params]
        if len(set(values)) > 1:
            table.add_row(name, *values)

    table.add_section()
    for name in _epoch_metrics(experiments, rows):
        # These only count.
        if name in {"epoch", "seconds"}:
            continue
        found = [score(experiments, row, name, better) for row in rows]
        cells = ["" if each is None else f"{each[0]:.5g} @ {each[1]}" for each in found]
        table.add_row(name, *cells)
    return table


def draw_runs(
    experiments: ExperimentLog, rows: Sequence[RunRow], metric: str | None, path: Path
) -> Path:
    """Draw the training loss and a metric by step as a PNG, one colour for each run.

    Parameters
    ----------
    metric
        None means the headline of each run.

    Returns
    -------
    Path
        The PNG.

    Raises
    ------
    ConfigError
        The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, row in enumerate(rows):
        colour, label = f"C{index % COLOURS}", f"{row['id']} {row['name']}"
        steps, values, _ = experiments.metric(row["id"], "loss", "step")
        left.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
        steps, values, _ = experiments.metric(row["id"], "loss")
        left.plot(steps, values, color=colour, marker=".", label=label)

        name = metric or row["headline"]
        steps, values, _ = experiments.metric(row["id"], name)
        right.plot(steps, values, color=colour, marker=".", label=f"{label}: {name}")

    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel=metric or "headline")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        # A longer legend would cover the curves.
        if 0 < len(rows) <= MOST_IN_LEGEND:
            axes.legend(fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(
            "the picture cannot be written",
            where=path,
            found=error.strerror,
            remedy="choose another --runs.output",
        ) from None
    return path
