"""The queue of a version's micro-jobs: a SQLite file from which many processes claim jobs.

Purpose: hand each job to one process at a time, and remember what was done, by whom and how long it
  took.
Used by: features.export, utils.jobs.derive, utils.jobs.publish_jobs, utils.jobs.run
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
            id INTEGER PRIMARY KEY,
            split TEXT NOT NULL,
            chunk INTEGER NOT NULL,
            samples INTEGER NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('open', 'running', 'done', 'failed')),
            attempts INTEGER NOT NULL DEFAULT 0,
            host TEXT,
            pid INTEGER,
            pid_started REAL,
            claimed REAL,
            ended REAL,
            seconds REAL,
            digest TEXT,
            error TEXT
        ) STRICT""",
    ),
)


ADD = "INSERT OR IGNORE INTO jobs (id, split, chunk, samples, state) VALUES (?, ?, ?, ?, 'open')"
# Failed jobs come last: one that fails for everybody does not hold up the others.
NEXT = "SELECT * FROM jobs WHERE state != 'done' ORDER BY state = 'failed', id"
CLAIM = """
    UPDATE jobs
    SET state = 'running', attempts = attempts + 1, host = ?, pid = ?, pid_started = ?,
        claimed = ?, ended = NULL, error = NULL
    WHERE id = ?"""
MOST_ERROR = 500
"""Characters of an error that are kept."""


@dataclass(frozen=True, slots=True)
class Job:
    """A job that this process has claimed.

    Attributes
    ----------
    id
        Position in the version's order of stored chunks.
    split, chunk
        Which stored chunk it makes.
    samples
        How many are in it.
    attempts
        How often it was claimed, this time included.
    """

    id: int
    split: str
    chunk: int
    samples: int
    attempts: int


class JobQueue:
    """An open queue; a context manager.

    Parameters
    ----------
    jobs
        (split, chunk, samples) of every job in order. Those that are not there yet are added.
    wait_s
        Seconds to wait for another process that is writing.

    Raises
    ------
    DatabaseError
        As `utils.tracking.database.open_database`.
    """

    def __init__(
        self, path: Path, jobs: Sequence[tuple[str, int, int]] = (), *, wait_s: float = 30.0
    ) -> None:
        self.path = path
        self.connection = open_database(path, QUEUE, wait_s=wait_s)
        self.connection.row_factory = sqlite3.Row
        self.tried: set[int] = set()
        process = psutil.Process()
        self.owner = (socket.gethostname(), process.pid, process.create_time())
        with self._write() as db:
            db.executemany(ADD, [(position, *job) for position, job in enumerate(jobs)])

    def claim(self) -> Job | None:
        """Claim the next job that no process holds; return None if there is none."""
        with self._write() as db:
            for row in db.execute(NEXT):
                # What failed here would fail here again; another command may try it.
                if row["id"] in self.tried:
                    continue
                if row["state"] == "running" and _held(row):
                    continue
                db.execute(CLAIM, (*self.owner, time.time(), row["id"]))
                attempts = row["attempts"] + 1
                return Job(row["id"], row["split"], row["chunk"], row["samples"], attempts)
        return None

    def finish(self, job: Job, seconds: float, digest: str) -> None:
        """Note that a job is done.

        Parameters
        ----------
        seconds
            What it took.
        digest
            Of the stored chunk's files, see `utils.jobs.run.chunk_digest`.
        """
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'done', ended = ?, seconds = ?, digest = ? WHERE id = ?",
                (time.time(), seconds, digest, job.id),
            )

    def fail(self, job: Job, error: str) -> None:
        """Note why a job failed; this process does not claim it again."""
        self.tried.add(job.id)
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'failed', ended = ?, error = ? WHERE id = ?",
                (time.time(), error[:MOST_ERROR], job.id),
            )

    def reopen(self, job_id: int, error: str) -> None:
        """Open a job that was done, because its stored chunk was changed or lost."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'open', digest = NULL, error = ? WHERE id = ?",
                (error[:MOST_ERROR], job_id),
            )

    def release(self, job: Job) -> None:
        """Give a job back undone, as after Ctrl-C."""
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'open' WHERE id = ? AND state = 'running'", (job.id,)
            )

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the table `jobs`, in order."""
        with transaction(self.connection, self.path, QUEUE, write=False) as db:
            return [dict(row) for row in db.execute("SELECT * FROM jobs ORDER BY id")]

    def left(self) -> int:
        """Return the number of jobs that are not done, including those that are running."""
        with transaction(self.connection, self.path, QUEUE, write=False) as db:
            return int(db.execute("SELECT count(*) FROM jobs WHERE state != 'done'").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def _write(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        return transaction(self.connection, self.path, QUEUE)

    def __enter__(self) -> JobQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _held(row: sqlite3.Row) -> bool:
    """Whether the process that runs a job is still there."""
    # The processes of another host cannot be listed from here.
    if row["host"] != socket.gethostname():
        return bool(time.time() - row["claimed"] < LEASE_S)
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(row["pid"])
        # Numbers of processes are used again; number and start together are not. A zombie was
        # killed, and only waits for its parent to notice.
        same = abs(process.create_time() - row["pid_started"]) < 1
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    return False
