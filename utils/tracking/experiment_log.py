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

import contextlib
import json
import math
import os
import platform
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil

from utils.tracking.database import Schema, open_database, transaction
from warehouse.format.manifest import code_version

__all__ = ["SCHEMA", "ExperimentLog", "Headline"]

Headline = tuple[str, Literal["min", "max"]]
"""The metric of `epoch` lines that decides which is best, and whether more is better."""

LOST_AFTER_S = 600.0
"""Silence after which a run on another host is taken for lost."""
ROOT = Path(__file__).parents[2]

BEST = """
    SELECT value, step FROM metrics
    WHERE run = ? AND kind = 'epoch' AND name = ? AND value IS NOT NULL
    ORDER BY value * ?, step LIMIT 1"""
FORMER = "SELECT id FROM runs WHERE trainer = ? AND output = ? ORDER BY id DESC LIMIT 1"
CURVE = """
    SELECT step, value, time FROM metrics
    WHERE run = ? AND kind = ? AND name = ? ORDER BY step"""

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
        params: Mapping[str, Any],
        *,
        data: tuple[str | None, str | None] = (None, None),
        output: Path | None = None,
        headline: Headline = ("loss", "min"),
        after_step: int | None = None,
    ) -> dict[str, Any]:
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
        dict
            The run's row of the table `runs`.

        Raises
        ------
        DatabaseError
            The log cannot be written.
        """
        now = time.time()
        folder = str(output.resolve()) if output else None
        facts = {
            "trainer": trainer,
            "name": name,
            "state": "running",
            "error": None,
            "updated": now,
            "ended": None,
            "headline": headline[0],
            "better": headline[1],
            "output": folder,
            "data_version": data[0],
            "data_split": data[1],
            **_process_facts(),
        }
        with transaction(self.connection, self.path, SCHEMA) as db:
            former = None
            if after_step is not None and folder is not None:
                former = db.execute(FORMER, (trainer, folder)).fetchone()
            if former is None:
                run_id = self._insert({**facts, "started": now})
            else:
                run_id = int(former[0])
                self._continue(run_id, facts, after_step, headline)
            rows = [(run_id, key, value) for key, value in flatten(params)]
            db.executemany("INSERT INTO params VALUES (?, ?, ?)", rows)
            return dict(db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone())

    def _insert(self, facts: Mapping[str, Any]) -> int:
        columns, marks = ", ".join(facts), ", ".join("?" * len(facts))
        statement = f"INSERT INTO runs ({columns}) VALUES ({marks})"  # noqa: S608 - names are ours
        return int(self.connection.execute(statement, tuple(facts.values())).lastrowid or 0)

    def _continue(
        self, run_id: int, facts: Mapping[str, Any], after_step: int | None, headline: Headline
    ) -> None:
        """Take over a run's row, and forget what lies after the step and which epoch was best."""
        db = self.connection
        changes = ", ".join(f"{key} = ?" for key in facts)
        db.execute(
            f"UPDATE runs SET {changes}, resumed = resumed + 1, step = ? WHERE id = ?",  # noqa: S608
            (*facts.values(), after_step, run_id),
        )
        db.execute("DELETE FROM metrics WHERE run = ? AND step > ?", (run_id, after_step))
        db.execute("DELETE FROM params WHERE run = ?", (run_id,))

        sign = -1 if headline[1] == "max" else 1
        best = db.execute(BEST, (run_id, headline[0], sign)).fetchone() or (None, None)
        db.execute("UPDATE runs SET best = ?, best_step = ? WHERE id = ?", (*best, run_id))

    def runs(
        self, *, trainer: str | None = None, ids: Iterable[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return rows of the table `runs`, oldest first.

        A run whose process no longer exists has the state `lost`.
        """
        wanted = None if ids is None else set(ids)
        rows = []
        for found in self._read("SELECT * FROM runs ORDER BY id"):
            row = dict(found)
            if trainer not in {None, row["trainer"]}:
                continue
            if wanted is not None and row["id"] not in wanted:
                continue
            if row["state"] == "running" and not _is_alive(row):
                row["state"] = "lost"
            rows.append(row)
        return rows

    def params(self, run_id: int) -> dict[str, Any]:
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

    def artefacts(self, run_id: int) -> list[dict[str, Any]]:
        """Return rows of the table `artefacts` of a run, by name."""
        rows = self._read("SELECT * FROM artefacts WHERE run = ? ORDER BY name", run_id)
        return [dict(row) for row in rows]

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


def flatten(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as ("a.b", JSON text)."""
    rows: list[tuple[str, str]] = []
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", json.dumps(value, default=str)))
    return rows


def _process_facts() -> dict[str, Any]:
    """What identifies the code and the process that runs it."""
    process = psutil.Process()
    return {
        "code_version": code_version(),
        "code_commit": _commit(),
        "host": socket.gethostname(),
        "pid": process.pid,
        # Numbers of processes are used again; number and start together are not.
        "pid_started": process.create_time(),
        "machine": json.dumps(_machine()),
    }


def _is_alive(row: Mapping[str, Any]) -> bool:
    """Ask for the process on this host; on another the time of its last write decides."""
    if row["host"] != socket.gethostname():
        return bool(time.time() - row["updated"] < LOST_AFTER_S)
    with contextlib.suppress(psutil.Error):
        return bool(abs(psutil.Process(row["pid"]).create_time() - row["pid_started"]) < 1)
    return False


def _machine() -> dict[str, Any]:
    # Importing one of these for its version would cost seconds, so only what is there is asked.
    versions: dict[str, str] = {
        name: str(getattr(sys.modules[name], "__version__", ""))
        for name in ("torch", "numpy", "zarr")
        if name in sys.modules
    }
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        **versions,
    }


def _commit() -> str | None:
    """The commit of a checkout, with "+" if tracked files differ from it.

    None for an installed package.
    """
    if not (ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changed else "")


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
