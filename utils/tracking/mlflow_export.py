"""Sending runs of the experiment log to MLflow.

Purpose: `export_mlflow` copies settings, metrics, files and states of runs that are not there yet.
Used by: scripts.inspect_runs
Design notes: MLflow is imported only when it is asked for. Figures go in batches of its limits,
  with their own times. A run carries a tag that names the log it comes from, and is not sent twice;
  the tag is written last, so that an export that broke off is done again.
Assistant guidance: when extending: read through utils.tracking.experiment_log only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.tracking.experiment_log import ExperimentLog, RunRow
from warehouse.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["export_mlflow"]

# The limits of MLflow's REST API for one request.
MOST_METRICS, MOST_PARAMS, MOST_TEXT = 1000, 100, 500
STATES = {
    "done": "FINISHED",
    "running": "RUNNING",
    "interrupted": "KILLED",
    "lost": "KILLED",
    "failed": "FAILED",
}
TAGS = (
    "state",
    "host",
    "code_version",
    "code_commit",
    "data_version",
    "data_split",
    "machine",
)
SOURCE_TAG = "book"
"""Which log and run. Its name is that of earlier exports, whose runs must be recognised."""


def export_mlflow(experiments: ExperimentLog, rows: Sequence[RunRow], uri: str) -> int:
    """Send runs to MLflow, one MLflow experiment for each trainer.

    Metrics are named "<kind>/<name>" and keep their steps and times; NaN is left out.

    Parameters
    ----------
    rows
        Of the table `runs`.
    uri
        Tracking URI.

    Returns
    -------
    int
        How many runs were new.

    Raises
    ------
    ConfigError
        MLflow is not installed, or refuses the runs.
    """
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise ConfigError(
            "MLflow is not installed", where=uri, remedy="pip install mlflow-skinny"
        ) from None
    try:
        client = MlflowClient(tracking_uri=uri)
        return sum(_export_run(client, experiments, row) for row in rows)
    except MlflowException as error:
        raise ConfigError(
            "MLflow refuses the runs",
            where=uri,
            found=str(error)[:300],
            remedy="check --runs.mlflow",
        ) from None


def _export_run(client: MlflowClient, experiments: ExperimentLog, row: RunRow) -> bool:
    """Send one run; return whether it was new."""
    found = client.get_experiment_by_name(row["trainer"])
    experiment = found.experiment_id if found else client.create_experiment(row["trainer"])
    source = f"{row['host']}:{experiments.path.resolve()}#{row['id']}"
    if client.search_runs([experiment], f"tags.{SOURCE_TAG} = '{source}'"):
        return False
    run_id = client.create_run(
        experiment,
        start_time=_milliseconds(row["started"]),
        run_name=f"{row['name']} {row['id']}",
    ).info.run_id
    _send_figures(client, run_id, experiments, row["id"])
    _send_files(client, run_id, experiments, row["id"])
    _send_tags(client, run_id, row, source)
    ended = _milliseconds(row["ended"] or row["updated"])
    client.set_terminated(run_id, STATES[row["state"]], ended)
    return True


def _send_figures(
    client: MlflowClient, run_id: str, experiments: ExperimentLog, number: int
) -> None:
    from mlflow.entities import Metric, Param

    params = [
        Param(_allowed(name), json.dumps(value)[:MOST_TEXT])
        for name, value in experiments.params(number).items()
    ]
    metrics = []
    for kind, name in experiments.metric_names(number):
        for step, value, time in zip(*experiments.metric(number, name, kind), strict=True):
            if not math.isnan(value):
                metrics.append(Metric(_allowed(f"{kind}/{name}"), value, _milliseconds(time), step))
    for start in range(0, len(params), MOST_PARAMS):
        client.log_batch(run_id, params=params[start : start + MOST_PARAMS])
    for start in range(0, len(metrics), MOST_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MOST_METRICS])


def _send_files(client: MlflowClient, run_id: str, experiments: ExperimentLog, number: int) -> None:
    for artefact in experiments.artefacts(number):
        if Path(artefact["path"]).is_file():
            folder = str(Path(artefact["name"]).parent).strip(".")
            client.log_artifact(run_id, artefact["path"], folder or None)


def _send_tags(client: MlflowClient, run_id: str, row: RunRow, source: str) -> None:
    from mlflow.entities import RunTag

    tags = {key: str(value) for key, value in row.items() if key in TAGS and value is not None}
    tags[SOURCE_TAG] = source
    client.log_batch(run_id, tags=[RunTag(key, value[:MOST_TEXT]) for key, value in tags.items()])


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


def _allowed(name: str) -> str:
    """The name with the characters that MLflow allows: letters, digits, and _-./ and spaces."""
    return re.sub(r"[^\w\-./ ]", "_", name)
