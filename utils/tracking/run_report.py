"""The experiment book as tables, as curves, and for MLflow.

Purpose: `runs_table`, `compare_table`, `best_run`, `draw_runs` and `export_mlflow` answer what
  inspect_runs is asked.
Used by: scripts.inspect_runs
Design notes: what is compared is what differs: settings that are the same in all runs are left out.
  Runs are scored by one metric of their `epoch` lines, their headline unless another is named; runs
  that do not have it are not ranked. MLflow is imported only when it is asked for; figures go in
  batches of its limit, with their own times, and a run that is there already is not sent twice.
Assistant guidance: when extending: read through utils.tracking.experiment_log only; drawing and
  MLflow stay lazy imports.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from utils.tracking.experiment_log import Book
from utils.tracking.settings import RunsSettings
from warehouse.errors import ConfigError

__all__ = [
    "best_run",
    "chosen_runs",
    "compare_table",
    "draw_runs",
    "export_mlflow",
    "runs_table",
    "score",
]

MLFLOW_METRICS, MLFLOW_PARAMS, MLFLOW_TEXT = 1000, 100, 500
STATES = {
    "done": "FINISHED",
    "running": "RUNNING",
    "interrupted": "KILLED",
    "lost": "KILLED",
    "failed": "FAILED",
}


def chosen_runs(book: Book, settings: RunsSettings) -> list[dict[str, Any]]:
    """The rows listed, newest last. Raises ConfigError for an id that is not in the book."""
    rows = book.runs(trainer=settings.trainer, ids=settings.compare)
    missing = sorted(set(settings.compare or []) - {row["id"] for row in rows})
    if missing:
        raise ConfigError(
            f"no run {missing[0]}",
            where=book.path,
            remedy="see their numbers with: python -m scripts.inspect_runs",
        )
    return rows if settings.compare else rows[-settings.limit :]


def score(
    book: Book, row: dict[str, Any], metric: str | None, better: str | None = None
) -> tuple[float, int] | None:
    """(best value, its step) of a run by its own headline or by `metric`.

    None where it has none.
    """
    name = metric or row["headline"]
    steps, values, _ = book.metric(row["id"], name)
    found = [
        (value, step) for value, step in zip(values, steps, strict=True) if not math.isnan(value)
    ]
    if not found:
        return None
    sign = 1 if (better or _direction(row, name)) == "max" else -1
    return max(found, key=lambda pair: (sign * pair[0], -pair[1]))


def _direction(row: dict[str, Any], name: str) -> str:
    if name == row["headline"]:
        return str(row["better"])
    return "min" if re.search(r"loss|error|rmse|mae|total|seconds|perplexity_gap", name) else "max"


def best_run(
    book: Book, rows: Sequence[dict[str, Any]], metric: str | None, better: str | None = None
) -> dict[str, Any] | None:
    """The best of the runs: id, metric, value, step, checkpoint (null when none was kept). None
    where nobody has the metric.

    Without a metric the newest run's headline decides. Raises ConfigError when a metric is named
    that no run has.
    """
    if not rows:
        return None
    name = metric or str(rows[-1]["headline"])
    direction = better or _direction(rows[-1], name)
    scored = [
        (found, row) for row in rows if (found := score(book, row, name, direction)) is not None
    ]
    if not scored:
        if metric is None:
            return None
        known = sorted(
            {name for row in rows for kind, name in book.metric_names(row["id"]) if kind == "epoch"}
        )
        raise ConfigError(
            f"no run has the metric {metric!r}",
            where=book.path,
            expected="one of " + ", ".join(known[:12]),
        )
    sign = 1 if direction == "max" else -1
    (value, step), row = max(scored, key=lambda pair: sign * pair[0][0])
    kept = book.path.parent / f"exp_{row['id']}" / "checkpoints"
    return {
        "id": row["id"],
        "name": row["name"],
        "metric": name,
        "value": value,
        "step": step,
        "checkpoint": str(kept) if (kept / "checkpoint.json").is_file() else None,
    }


def runs_table(
    book: Book, rows: Sequence[dict[str, Any]], metric: str | None, better: str | None = None
) -> Table:
    table = Table(title=f"{len(rows)} runs in {book.path}")
    for column in (
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
    ):
        table.add_column(column)
    for row in rows:
        found = score(book, row, metric, better)
        best = "" if found is None else f"{metric or row['headline']} {found[0]:.4g} @ {found[1]}"
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started"]))
        took = f"{(row['ended'] or row['updated']) - row['started']:.0f} s"
        code = row["code_version"] + (
            f" {row['code_commit'][:8]}{'+' * row['code_commit'].endswith('+')}"
            if row["code_commit"]
            else ""
        )
        cells = (
            row["id"],
            row["trainer"],
            row["name"],
            row["state"],
            started,
            took,
            row["step"],
            best,
            row["data_version"] or "",
            code,
            row["host"],
        )
        table.add_row(*map(str, cells))
    return table


def compare_table(book: Book, rows: Sequence[dict[str, Any]], better: str | None = None) -> Table:
    """Settings that differ, then each `epoch` metric's best value, a column a run."""
    table = Table(title="what differs, and the best of each metric")
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['id']} {row['name']}")
    params = [book.params(row["id"]) for row in rows]
    for name in sorted(set().union(*params)):
        values = [json.dumps(each[name]) if name in each else "" for each in params]
        if len(set(values)) > 1:
            table.add_row(name, *values)
    table.add_section()
    metrics = {
        name for row in rows for kind, name in book.metric_names(row["id"]) if kind == "epoch"
    } - {"epoch", "seconds"}
    for name in sorted(metrics):
        found = [score(book, row, name, better) for row in rows]
        table.add_row(
            name, *("" if each is None else f"{each[0]:.5g} @ {each[1]}" for each in found)
        )
    return table


def draw_runs(book: Book, rows: Sequence[dict[str, Any]], metric: str | None, path: Path) -> Path:
    """Loss by step (thin), and the metric by step: one colour a run. A PNG.

    Raises ConfigError when it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for at, row in enumerate(rows):
        colour, label = f"C{at % 10}", f"{row['id']} {row['name']}"
        for kind, style in (
            ("step", {"alpha": 0.3, "linewidth": 0.8}),
            ("epoch", {"marker": ".", "label": label}),
        ):
            steps, values, _ = book.metric(row["id"], "loss", kind)
            left.plot(steps, values, color=colour, **style)
        name = metric or row["headline"]
        steps, values, _ = book.metric(row["id"], name)
        right.plot(steps, values, color=colour, marker=".", label=f"{label}: {name}")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel=metric or "headline")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if 0 < len(rows) <= 12:
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


def export_mlflow(book: Book, rows: Sequence[dict[str, Any]], uri: str) -> int:
    """Send runs to the MLflow at a tracking URI, one MLflow experiment a trainer; how many were
    new. Raises ConfigError without MLflow or when it refuses. Metrics are named "<kind>/<name>", at
    their steps and times; NaN is left out."""
    try:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise ConfigError(
            "MLflow is not installed", where=uri, remedy="pip install mlflow-skinny"
        ) from None
    sent = 0
    try:
        client = MlflowClient(tracking_uri=uri)
        for row in rows:
            found = client.get_experiment_by_name(row["trainer"])
            experiment = found.experiment_id if found else client.create_experiment(row["trainer"])
            mark = f"{row['host']}:{book.path.resolve()}#{row['id']}"
            if client.search_runs([experiment], f"tags.book = '{mark}'"):
                continue
            tags = {
                "book": mark,
                **{
                    key: str(row[key])
                    for key in (
                        "state",
                        "host",
                        "code_version",
                        "code_commit",
                        "data_version",
                        "data_split",
                        "machine",
                    )
                    if row[key] is not None
                },
            }
            run_id = client.create_run(
                experiment, start_time=_ms(row["started"]), run_name=f"{row['name']} {row['id']}"
            ).info.run_id
            params = [
                Param(_key(name), json.dumps(value)[:MLFLOW_TEXT])
                for name, value in book.params(row["id"]).items()
            ]
            metrics = [
                Metric(_key(f"{kind}/{name}"), value, _ms(at), step)
                for kind, name in book.metric_names(row["id"])
                for step, value, at in zip(*book.metric(row["id"], name, kind), strict=True)
                if not math.isnan(value)
            ]
            for at in range(0, len(params), MLFLOW_PARAMS):
                client.log_batch(run_id, params=params[at : at + MLFLOW_PARAMS])
            for at in range(0, len(metrics), MLFLOW_METRICS):
                client.log_batch(run_id, metrics=metrics[at : at + MLFLOW_METRICS])
            for artefact in book.artefacts(row["id"]):
                if Path(artefact["path"]).is_file():
                    client.log_artifact(
                        run_id,
                        artefact["path"],
                        str(Path(artefact["name"]).parent).strip(".") or None,
                    )
            # The mark comes last: a broken export is sent again.
            client.log_batch(
                run_id, tags=[RunTag(key, value[:MLFLOW_TEXT]) for key, value in tags.items()]
            )
            client.set_terminated(run_id, STATES[row["state"]], _ms(row["ended"] or row["updated"]))
            sent += 1
    except MlflowException as error:
        raise ConfigError(
            "MLflow refuses the runs",
            where=uri,
            found=str(error)[:300],
            remedy="check --runs.mlflow",
        ) from None
    return sent


def _ms(seconds: float) -> int:
    return round(1000 * seconds)


def _key(name: str) -> str:
    """MLflow allows letters, digits and _-./ and spaces."""
    return re.sub(r"[^\w\-./ ]", "_", name)
