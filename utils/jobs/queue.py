"""The queue of a version's micro-jobs: one SQLite file that any number of processes claim jobs
from.

Purpose: hand each job to one process at a time, and remember what was done, by whom and how long it
  took.
Used by: features.export, utils.jobs.derive, utils.jobs.publish, utils.jobs.run
Design notes: a job is claimed in one write transaction, so no two processes hold it. Its owner is a
  process of a host; a job whose process is gone is free again, on another host after `LEASE_S`
  seconds. States: open -> running -> done | failed; a failed job is tried again by the next
  command. Given up: priorities, and queues on file systems without locks.
Assistant guidance: when extending: the stored chunk's marker decides what is done; the queue is
  bookkeeping that may be lost.
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from utils.tracking.database import Schema, open_database, transaction

__all__ = ["QUEUE", "Job", "JobQueue"]

LEASE_S = 3600.0
QUEUE = Schema(
    "job queue",
    0x54574A51,  # "TWJQ"
    1,
    (
        """CREATE TABLE jobs (
            id INTEGER PRIMARY KEY, split TEXT NOT NULL, chunk INTEGER NOT NULL, samples INTEGER NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('open', 'running', 'done', 'failed')), attempts INTEGER NOT NULL DEFAULT 0,
            host TEXT, pid INTEGER, pid_started REAL, claimed REAL, ended REAL, seconds REAL, digest TEXT, error TEXT) STRICT""",
    ),
)


@dataclass(frozen=True, slots=True)
class Job:
    """id: place in the version's order of stored chunks; attempts: this one included."""

    id: int
    split: str
    chunk: int
    samples: int
    attempts: int


class JobQueue:
    """An open queue. Raises DatabaseError as `utils.tracking.database.open_database` does.

    A context manager.
    """

    def __init__(
        self, path: Path, jobs: Sequence[tuple[str, int, int]] = (), *, wait_s: float = 30.0
    ) -> None:
        """jobs: (split, chunk, samples) of every job in order.

        Those that are not there yet are added as open.
        """
        self.path = path
        self.connection = open_database(path, QUEUE, wait_s=wait_s)
        self.connection.row_factory = sqlite3.Row
        self.tried: set[int] = set()
        process = psutil.Process()
        self.owner = (socket.gethostname(), process.pid, process.create_time())
        with self._write() as db:
            db.executemany(
                "INSERT OR IGNORE INTO jobs (id, split, chunk, samples, state) VALUES (?, ?, ?, ?, 'open')",
                [(at, *job) for at, job in enumerate(jobs)],
            )

    def claim(self) -> Job | None:
        """The next job nobody holds, now this process's; None when there is none.

        A job that failed here is not claimed again.
        """
        with self._write() as db:
            for row in db.execute(
                "SELECT * FROM jobs WHERE state != 'done' ORDER BY state = 'failed', id"
            ):
                if row["id"] not in self.tried and not (row["state"] == "running" and _held(row)):
                    db.execute(
                        """UPDATE jobs SET state = 'running', attempts = attempts + 1, host = ?, pid = ?, pid_started = ?, claimed = ?,
                           ended = NULL, error = NULL WHERE id = ?""",
                        (*self.owner, time.time(), row["id"]),
                    )
                    return Job(
                        row["id"], row["split"], row["chunk"], row["samples"], row["attempts"] + 1
                    )
        return None

    def finish(self, job: Job, seconds: float, digest: str) -> None:
        """seconds: what it took; digest: of the stored chunk's files."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'done', ended = ?, seconds = ?, digest = ? WHERE id = ?",
                (time.time(), seconds, digest, job.id),
            )

    def fail(self, job: Job, error: str) -> None:
        self.tried.add(job.id)
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'failed', ended = ?, error = ? WHERE id = ?",
                (time.time(), error[:500], job.id),
            )

    def reopen(self, job_id: int, error: str) -> None:
        """A done job whose chunk is not what it was."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'open', digest = NULL, error = ? WHERE id = ?",
                (error[:500], job_id),
            )

    def release(self, job: Job) -> None:
        """Give a job back undone, as after Ctrl-C."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'open' WHERE id = ? AND state = 'running'", (job.id,)
            )

    def rows(self) -> list[dict[str, Any]]:
        with transaction(self.connection, self.path, QUEUE, write=False) as db:
            return [dict(row) for row in db.execute("SELECT * FROM jobs ORDER BY id")]

    def left(self) -> int:
        """Jobs that are not done, whoever holds them."""
        with transaction(self.connection, self.path, QUEUE, write=False) as db:
            return int(db.execute("SELECT count(*) FROM jobs WHERE state != 'done'").fetchone()[0])

    def close(self) -> None:
        self.connection.close()

    def _write(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return transaction(self.connection, self.path, QUEUE)

    def __enter__(self) -> JobQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _held(row: sqlite3.Row) -> bool:
    """Whether the process that runs a job is still there."""
    if row["host"] != socket.gethostname():
        return bool(time.time() - row["claimed"] < LEASE_S)
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(row["pid"])
        return bool(
            abs(process.create_time() - row["pid_started"]) < 1
            and process.status() != psutil.STATUS_ZOMBIE
        )
    return False
