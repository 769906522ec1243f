"""The file of the experiment log: its schema, how runs are added to it, and how it is read.

Purpose: `ExperimentLog` opens experiments.db, begins runs, and returns runs, parameters, metrics
  and artefacts.
Used by: scripts.inspect_runs, utils.tracking.experiments, utils.tracking.mlflow_export,
  utils.tracking.run_report
Design notes: docs/experiments.md describes the tables for people with other tools. Metrics are one
  narrow table clustered by (run, kind, name, step), so that a curve is one range read. A run whose
  process died stays `running` in the file; readers see `lost`.
Assistant guidance: when extending: no torch here; a new column is a new schema version with a way
  up from the old one.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypedDict, cast

from utils.tracking.database import Schema, open_database, transaction
from utils.tracking.process_facts import is_alive, process_facts

__all__ = ["SCHEMA", "ArtefactRow", "ExperimentLog", "Headline", "RunRow"]

Headline = tuple[str, Literal["min", "max"]]
"""The metric of `epoch` lines that decides which is best, and whether more is better."""


class RunRow(TypedDict):
    """A row of the table `runs`; docs/experiments.md says what each column holds."""

    id: int
    trainer: str
    name: str
    state: Literal["running", "done", "interrupted", "failed", "lost"]
    error: str | None
    started: float
    updated: float
    ended: float | None
    resumed: int
    step: int
    headline: str
    better: Literal["max", "min"]
    best: float | None
    best_step: int | None
    output: str | None
    code_version: str
    code_commit: str | None
    data_version: str | None
    data_split: str | None
    host: str
    pid: int
    pid_started: float
    machine: str


class ArtefactRow(TypedDict):
    """A row of the table `artefacts`: a file that a run wrote."""

    run: int
    name: str
    path: str
    bytes: int
    sha256: str


# Of equal values the earliest epoch is best, as for the run that compares them while it trains.
BEST = """
    SELECT value, step FROM metrics
    WHERE run = ? AND kind = 'epoch' AND name = ? AND value IS NOT NULL
    ORDER BY value * ?, step LIMIT 1"""
ADD_PARAM = "INSERT INTO params VALUES (?, ?, ?)"
FORMER = "SELECT id FROM runs WHERE trainer = ? AND output = ? ORDER BY id DESC LIMIT 1"
# The order of the primary key: the rows come in one range read, without sorting.
CURVE = """
    SELECT step, value, time FROM metrics
    WHERE run = ? AND kind = ? AND name = ? ORDER BY step"""

# STRICT makes SQLite refuse a value of another type. WITHOUT ROWID stores the rows of a curve side
# by side in the order of the primary key, and saves the second copy of the key in an index.
# AUTOINCREMENT never gives a number twice: the folders exp_<id> are named by it.
SCHEMA = Schema(
    "experiment log",
    0x54574542,  # "TWEB"
    1,
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            trainer TEXT NOT NULL,
            name TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('running', 'done', 'interrupted', 'failed')),
            error TEXT,
            started REAL NOT NULL,
            updated REAL NOT NULL,
            ended REAL,
            resumed INTEGER NOT NULL DEFAULT 0,
            step INTEGER NOT NULL DEFAULT 0,
            headline TEXT NOT NULL,
            better TEXT NOT NULL CHECK (better IN ('max', 'min')),
            best REAL,
            best_step INTEGER,
            output TEXT,
            code_version TEXT NOT NULL,
            code_commit TEXT,
            data_version TEXT,
            data_split TEXT,
            host TEXT NOT NULL,
            pid INTEGER NOT NULL,
            pid_started REAL NOT NULL,
            machine TEXT NOT NULL
        ) STRICT""",
        """CREATE TABLE params (
            run INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (run, name)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE metrics (
            run INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            step INTEGER NOT NULL,
            value REAL,
            time REAL NOT NULL,
            PRIMARY KEY (run, kind, name, step)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE artefacts (
            run INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            path TEXT NOT NULL,
            bytes INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            PRIMARY KEY (run, name)
        ) STRICT, WITHOUT ROWID""",
    ),
)


class ExperimentLog:
    """An open experiments.db; a context manager.

    Parameters
    ----------
    wait_s
        Seconds to wait for another process that is writing.
    create
        Whether the file is made if it is not there.

    Raises
    ------
    DatabaseError, ConfigError
        As `utils.tracking.database.open_database`.
    """

    def __init__(self, path: Path, *, wait_s: float = 20.0, create: bool = True) -> None:
        self.path, self.wait_s = path, wait_s
        self.connection = open_database(path, SCHEMA, wait_s=wait_s, create=create)
        self.connection.row_factory = sqlite3.Row

    def begin(
        self,
        trainer: str,
        name: str,
        params: Mapping[str, object],
        *,
        data: tuple[str | None, str | None] = (None, None),
        output: Path | None = None,
        headline: Headline = ("loss", "min"),
        after_step: int | None = None,
    ) -> RunRow:
        """Begin a run, or continue one.

        Parameters
        ----------
        trainer
            The settings section.
        params
            Settings. Nested ones are stored under names like "model.kind", all as JSON.
        data
            Version and split that are trained on.
        output
            The folder that the trainer writes.
        headline
            What decides which epoch is best.
        after_step
            Continue the last run of this trainer and output, and delete its figures after this
            step; None begins a new run.

        Returns
        -------
        RunRow
            The run's row of the table `runs`.

        Raises
        ------
        DatabaseError
            The log cannot be written.
        """
        facts: dict[str, object] = {
            "trainer": trainer,
            "name": name,
            "state": "running",
            "error": None,
            "updated": time.time(),
            "ended": None,
            "headline": headline[0],
            "better": headline[1],
            "output": str(output.resolve()) if output else None,
            "data_version": data[0],
            "data_split": data[1],
            **process_facts(),
        }
        # One transaction, so that no reader sees a run without its settings.
        with transaction(self.connection, self.path, SCHEMA) as db:
            former = self._continue(facts, after_step, headline)
            # A run that earlier sessions did not record begins here, though it is resumed.
            run_id = former or self._insert({**facts, "started": facts["updated"]})
            db.executemany(ADD_PARAM, [(run_id, *row) for row in flatten(params)])
            return _run_row(db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone())

    def _insert(self, facts: Mapping[str, object]) -> int:
        columns, marks = ", ".join(facts), ", ".join("?" * len(facts))
        statement = f"INSERT INTO runs ({columns}) VALUES ({marks})"  # noqa: S608 - names are ours
        return int(self.connection.execute(statement, tuple(facts.values())).lastrowid or 0)

    def _continue(
        self, facts: Mapping[str, object], after_step: int | None, headline: Headline
    ) -> int | None:
        """Take over the row of the last run, and forget what it recorded after the step.

        Returns its number, or None if no run is to be continued or there is none.
        """
        db = self.connection
        if after_step is None:
            return None
        former = db.execute(FORMER, (facts["trainer"], facts["output"])).fetchone()
        if former is None:
            return None
        run_id = int(former["id"])
        changes = ", ".join(f"{key} = ?" for key in facts)
        db.execute(
            f"UPDATE runs SET {changes}, resumed = resumed + 1, step = ? WHERE id = ?",  # noqa: S608
            (*facts.values(), after_step, run_id),
        )
        # The steps after the checkpoint are made again; without this they would be told twice.
        db.execute("DELETE FROM metrics WHERE run = ? AND step > ?", (run_id, after_step))
        db.execute("DELETE FROM params WHERE run = ?", (run_id,))

        # The best epoch may be among those that were deleted, and the headline another one now.
        sign = -1 if headline[1] == "max" else 1
        best = db.execute(BEST, (run_id, headline[0], sign)).fetchone() or (None, None)
        db.execute("UPDATE runs SET best = ?, best_step = ? WHERE id = ?", (*best, run_id))
        return run_id

    def runs(self, *, trainer: str | None = None, ids: Iterable[int] | None = None) -> list[RunRow]:
        """Return rows of the table `runs`, oldest first.

        A run whose process no longer exists has the state `lost`.
        """
        wanted = None if ids is None else set(ids)
        rows = []
        for found in self._read("SELECT * FROM runs ORDER BY id"):
            row = _run_row(found)
            if trainer not in {None, row["trainer"]}:
                continue
            if wanted is not None and row["id"] not in wanted:
                continue
            # Only in what is returned: a reader writes nothing, and the process may be resumed.
            running = row["state"] == "running"
            if running and not is_alive(
                host=row["host"],
                pid=row["pid"],
                pid_started=row["pid_started"],
                updated=row["updated"],
            ):
                row["state"] = "lost"
            rows.append(row)
        return rows

    def params(self, run_id: int) -> dict[str, object]:
        """Return the settings of a run, decoded from JSON, by flat name."""
        rows = self._read("SELECT * FROM params WHERE run = ? ORDER BY name", run_id)
        return {row["name"]: json.loads(row["value"]) for row in rows}

    def metric(
        self, run_id: int, name: str, kind: str = "epoch"
    ) -> tuple[list[int], list[float], list[float]]:
        """Return a curve: steps, values and Unix times, by step; a value may be NaN."""
        rows = self._read(CURVE, run_id, kind, name)
        return (
            [row["step"] for row in rows],
            [math.nan if row["value"] is None else row["value"] for row in rows],
            [row["time"] for row in rows],
        )

    def metric_names(self, run_id: int) -> list[tuple[str, str]]:
        """Return (kind, name) of every metric of a run."""
        rows = self._read("SELECT DISTINCT kind, name FROM metrics WHERE run = ?", run_id)
        return [(row["kind"], row["name"]) for row in rows]

    def artefacts(self, run_id: int) -> list[ArtefactRow]:
        """Return rows of the table `artefacts` of a run, by name."""
        rows = self._read("SELECT * FROM artefacts WHERE run = ? ORDER BY name", run_id)
        return [cast(ArtefactRow, dict(row)) for row in rows]

    def _read(self, query: str, *values: object) -> list[sqlite3.Row]:
        with transaction(self.connection, self.path, SCHEMA, write=False) as connection:
            return connection.execute(query, values).fetchall()

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def __enter__(self) -> ExperimentLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _run_row(found: sqlite3.Row) -> RunRow:
    # The columns were compared with the schema when the file was opened.
    return cast(RunRow, dict(found))


def flatten(params: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as ("a.b", JSON text)."""
    rows: list[tuple[str, str]] = []
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", json.dumps(value, default=str)))
    return rows
