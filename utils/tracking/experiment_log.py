"""The experiment book's file: its schema, how a run begins in it or goes on, and how it is read.

Purpose: `Book` opens experiments.db, begins runs, and gives runs, parameters, metrics and artefacts
  back.
Used by: scripts.inspect_runs, utils.tracking.experiments, utils.tracking.run_report
Design notes: docs/experiments.md describes the tables for people with other tools. Metrics are one
  narrow table clustered by (run, kind, name, step): a curve is one range read. A run whose process
  died stays `running` in the file; readers see `lost`.
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
from typing import Any

import psutil

from utils.tracking.database import Schema, open_database, transaction
from warehouse.format.manifest import code_version

__all__ = ["SCHEMA", "Book"]

LOST_AFTER_S = 600.0
ROOT = Path(__file__).parents[2]
BEST = """SELECT value, step FROM metrics WHERE run = ? AND kind = 'epoch' AND name = ? AND value IS NOT NULL
          ORDER BY value * ?, step LIMIT 1"""

SCHEMA = Schema(
    "experiment book",
    0x54574542,  # "TWEB"
    1,
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY AUTOINCREMENT, trainer TEXT NOT NULL, name TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('running', 'done', 'interrupted', 'failed')), error TEXT,
            started REAL NOT NULL, updated REAL NOT NULL, ended REAL, resumed INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0,
            headline TEXT NOT NULL, better TEXT NOT NULL CHECK (better IN ('max', 'min')), best REAL, best_step INTEGER, output TEXT,
            code_version TEXT NOT NULL, code_commit TEXT, data_version TEXT, data_split TEXT, host TEXT NOT NULL, pid INTEGER NOT NULL,
            pid_started REAL NOT NULL, machine TEXT NOT NULL) STRICT""",
        """CREATE TABLE params (
            run INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE, name TEXT NOT NULL, value TEXT NOT NULL,
            PRIMARY KEY (run, name)) STRICT, WITHOUT ROWID""",
        """CREATE TABLE metrics (
            run INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE, kind TEXT NOT NULL, name TEXT NOT NULL, step INTEGER NOT NULL,
            value REAL, time REAL NOT NULL,
            PRIMARY KEY (run, kind, name, step)) STRICT, WITHOUT ROWID""",
        """CREATE TABLE artefacts (
            run INTEGER NOT NULL REFERENCES runs(id) ON DELETE CASCADE, name TEXT NOT NULL, path TEXT NOT NULL, bytes INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            PRIMARY KEY (run, name)) STRICT, WITHOUT ROWID""",
    ),
)


class Book:
    """An open experiments.db.

    Raises DatabaseError or ConfigError as `utils.tracking.database.open_database` does.
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
        headline: tuple[str, str] = ("loss", "min"),
        after_step: int | None = None,
    ) -> dict[str, Any]:
        """Begin a run, or go on with one; its row of `runs`.

        trainer: the settings section; params: nested settings, kept flat as "a.b" with JSON values;
        data: (version, split) trained on; output: the folder the trainer writes; headline: the
        metric of `epoch` lines that says which is best, and "max" or "min". after_step: go on with
        the last run of this trainer and output, of which figures after that step are forgotten;
        None: a new run.
        """
        now, process = time.time(), psutil.Process()
        facts = {
            "trainer": trainer,
            "name": name,
            "state": "running",
            "error": None,
            "updated": now,
            "ended": None,
            "headline": headline[0],
            "better": headline[1],
            "output": str(output.resolve()) if output else None,
            "code_version": code_version(),
            "code_commit": _commit(),
            "data_version": data[0],
            "data_split": data[1],
            "host": socket.gethostname(),
            "pid": process.pid,
            "pid_started": process.create_time(),
            "machine": json.dumps(_machine()),
        }
        with transaction(self.connection, self.path, SCHEMA) as db:
            former = None
            if after_step is not None and output is not None:
                query = (
                    "SELECT id FROM runs WHERE trainer = ? AND output = ? ORDER BY id DESC LIMIT 1"
                )
                former = db.execute(query, (trainer, facts["output"])).fetchone()
            if former is None:
                facts["started"] = now
                into = (
                    f"INSERT INTO runs ({', '.join(facts)}) VALUES ({', '.join('?' * len(facts))})"  # noqa: S608 - names are ours
                )
                run_id = int(db.execute(into, tuple(facts.values())).lastrowid or 0)
            else:
                run_id = int(former[0])
                change = f"UPDATE runs SET {', '.join(f'{key} = ?' for key in facts)}, resumed = resumed + 1, step = ? WHERE id = ?"  # noqa: S608
                db.execute(change, (*facts.values(), after_step, run_id))
                db.execute("DELETE FROM metrics WHERE run = ? AND step > ?", (run_id, after_step))
                db.execute("DELETE FROM params WHERE run = ?", (run_id,))
                self._recall_best(run_id, headline)
            db.executemany(
                "INSERT INTO params VALUES (?, ?, ?)",
                [(run_id, key, value) for key, value in flat(params)],
            )
            return dict(db.execute("SELECT * FROM runs WHERE id = ?", (run_id,)).fetchone())

    def _recall_best(self, run_id: int, headline: tuple[str, str]) -> None:
        sign = -1 if headline[1] == "max" else 1
        best = self.connection.execute(BEST, (run_id, headline[0], sign)).fetchone() or (None, None)
        self.connection.execute(
            "UPDATE runs SET best = ?, best_step = ? WHERE id = ?", (*best, run_id)
        )

    def runs(
        self, *, trainer: str | None = None, ids: Iterable[int] | None = None
    ) -> list[dict[str, Any]]:
        """Rows of `runs`, oldest first; the state of a run whose process is gone is `lost`.

        Raises DatabaseError.
        """
        rows = [dict(row) for row in self._all("SELECT * FROM runs ORDER BY id", ())]
        wanted = None if ids is None else set(ids)
        rows = [
            row
            for row in rows
            if trainer in {None, row["trainer"]} and (wanted is None or row["id"] in wanted)
        ]
        return [
            row
            | {"state": "lost" if row["state"] == "running" and not _alive(row) else row["state"]}
            for row in rows
        ]

    def params(self, run_id: int) -> dict[str, Any]:
        return {
            row["name"]: json.loads(row["value"])
            for row in self._all("SELECT * FROM params WHERE run = ? ORDER BY name", (run_id,))
        }

    def metric(
        self, run_id: int, name: str, kind: str = "epoch"
    ) -> tuple[list[int], list[float], list[float]]:
        """(steps, values, Unix times), by step; NaN where the value was NaN."""
        rows = self._all(
            "SELECT step, value, time FROM metrics WHERE run = ? AND kind = ? AND name = ? ORDER BY step",
            (run_id, kind, name),
        )
        return (
            [row[0] for row in rows],
            [math.nan if row[1] is None else row[1] for row in rows],
            [row[2] for row in rows],
        )

    def metric_names(self, run_id: int) -> list[tuple[str, str]]:
        """(kind, name) of every metric of a run."""
        return [
            (row[0], row[1])
            for row in self._all("SELECT DISTINCT kind, name FROM metrics WHERE run = ?", (run_id,))
        ]

    def artefacts(self, run_id: int) -> list[dict[str, Any]]:
        return [
            dict(row)
            for row in self._all("SELECT * FROM artefacts WHERE run = ? ORDER BY name", (run_id,))
        ]

    def _all(self, query: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        with transaction(self.connection, self.path, SCHEMA, write=False) as connection:
            return connection.execute(query, values).fetchall()

    def close(self) -> None:
        self.connection.close()

    def __enter__(self) -> Book:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def flat(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as ("a.b", JSON text)."""
    out: list[tuple[str, str]] = []
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            out += flat(value, f"{prefix}{key}.")
        else:
            out.append((f"{prefix}{key}", json.dumps(value, default=str)))
    return out


def _alive(row: Mapping[str, Any]) -> bool:
    """On this host the process itself tells; elsewhere the time of its last write."""
    if row["host"] != socket.gethostname():
        return bool(time.time() - row["updated"] < LOST_AFTER_S)
    with contextlib.suppress(psutil.Error):
        return bool(abs(psutil.Process(row["pid"]).create_time() - row["pid_started"]) < 1)
    return False


def _machine() -> dict[str, Any]:
    versions: dict[str, Any] = {
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
    """The commit of a checkout, with "+" when tracked files differ from it.

    None for an installed package.
    """
    if not (ROOT / ".git").exists():
        return None
    git = ("git", "-C", str(ROOT))
    try:
        head, changed = (
            subprocess.run(  # noqa: S603
                [*git, *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changed.strip() else "")
