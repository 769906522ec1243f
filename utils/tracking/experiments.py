"""A run records itself in the experiment log while it goes: figures by step, the best checkpoint,
files, how it ended.

Purpose: `open_run` begins a `Run`; `Run.log` takes a line of figures; `Run.finish`, or the end of
  its `with` block, ends it.
Used by: features.heads.run_heads, utils.tracking.run_log, utils.training.run.recording
Design notes: a step only appends to a queue. A thread writes what has gathered once a second and in
  one transaction, so that neither a slow disk nor nine other runs delay a step. A log that cannot
  be opened is an error before training; if writing fails later there is a warning, and log.jsonl
  still has every line. A killed run loses its last second. The best checkpoint is kept as a hard
  link under exp_<id>/checkpoints, which costs no disk until the trainer replaces its own.
Assistant guidance: when extending: no torch here; nothing in `log` may wait, read or compute.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeGuard

from utils.log import get_log
from utils.tracking.database import transaction
from utils.tracking.experiment_log import SCHEMA, ExperimentLog, Headline, RunRow
from utils.tracking.settings import ExperimentSettings
from warehouse.errors import DatabaseError
from warehouse.format.durable import fsync_folder

__all__ = ["Run", "open_run"]

log = get_log(__name__)
FLUSH_S = 1.0
MOST_WAITING = 200_000
"""Lines kept while the log cannot be written: about 100 MB of them."""
MOST_ERROR = 500
"""Characters of an error that are kept."""


class _Line(NamedTuple):
    kind: str
    step: int
    time: float
    values: Mapping[str, object]


class Run:
    """One run that is being recorded; made by `open_run`.

    A context manager: leaving the block ends the run as `done`, `failed` or `interrupted`. Nothing
    here raises if the log is locked or breaks: that is a warning, once. A run must not be shared
    between threads or processes; every process opens its own.

    Parameters
    ----------
    row
        Of the table `runs`.
    every
        Record every n-th step.

    Attributes
    ----------
    id
        Number of the run.
    folder
        exp_<id> beside the log, for what belongs to the run.
    """

    def __init__(self, experiments: ExperimentLog, row: RunRow, every: int = 1) -> None:
        self.experiments, self.id, self.every = experiments, int(row["id"]), every
        self.folder = experiments.path.parent / f"exp_{self.id}"
        self.output = Path(row["output"]) if row["output"] else None
        self.headline = str(row["headline"])
        self.sign = 1 if row["better"] == "max" else -1
        self.best: tuple[float | None, int | None] = (row["best"], row["best_step"])
        self.step, self.lost = int(row["step"]), 0
        self.warned = self.ended = False

        # Appending to a deque and taking from it are atomic, so `log` needs no lock.
        self._queue: deque[_Line] = deque()
        self._waiting: list[_Line] = []
        self._changes: deque[tuple[str, tuple[object, ...]]] = deque()
        self._ending = threading.Event()
        self._writer = threading.Thread(
            target=self._write_until_the_end, name=f"experiment-{self.id}", daemon=True
        )
        self._writer.start()

    def log(self, kind: str, step: int, values: Mapping[str, object]) -> None:
        """Record the numbers of a line.

        Parameters
        ----------
        kind
            `step`, `epoch` (held-out figures, which decide which checkpoint is best), or another.
        values
            By name. What is not a number is left out; NaN becomes NULL. The mapping is read later
            and must not be changed.
        """
        if kind == "step" and step % self.every:
            return
        if kind == "epoch":
            self._compare(step, values.get(self.headline))
        self.step = max(self.step, step)
        self._queue.append(_Line(kind, step, time.time(), values))

    def _compare(self, step: int, value: object) -> None:
        if not _is_number(value) or math.isnan(value):
            return
        best, best_step = self.best
        # The same step may come again with a late score.
        if best is None or self.sign * value > self.sign * best or step == best_step:
            self.best = (float(value), step)

    def saved(self, checkpoint: Path, step: int) -> None:
        """Keep a checkpoint in exp_<id>/checkpoints if it is the best so far.

        Parameters
        ----------
        checkpoint
            Its folder.
        """
        if self.best[1] != step:
            return
        files = [
            *sorted(checkpoint.glob("checkpoint-*.safetensors")),
            checkpoint / "checkpoint.json",
        ]
        try:
            keep(files, self.folder / "checkpoints")
        except OSError as error:
            self._warn(f"the best checkpoint could not be kept in {self.folder}: {error.strerror}")

    def artefact(self, path: Path, name: str | None = None) -> None:
        """Record a file: absolute path, size and sha256.

        A file that cannot be read is a warning.

        Parameters
        ----------
        name
            None means the name of the file.
        """
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            self._warn(f"the file {path} could not be recorded: {error.strerror}")
            return
        row = (self.id, name or path.name, str(path.resolve()), size, digest)
        self._changes.append(("INSERT OR REPLACE INTO artefacts VALUES (?, ?, ?, ?, ?)", row))

    def finish(
        self, state: Literal["done", "interrupted", "failed"] = "done", error: str | None = None
    ) -> None:
        """Write what is left, record the files of the run, and close the log.

        A second call does nothing.
        """
        if self.ended:
            return
        self.ended = True
        self._ending.set()
        self._writer.join()

        self._record_files(self.output, "")
        self._record_files(self.folder / "checkpoints", "best/")
        end = (state, error and error[:MOST_ERROR], time.time(), self.id)
        self._changes.append(("UPDATE runs SET state = ?, error = ?, ended = ? WHERE id = ?", end))
        self._flush()
        unwritten = len(self._waiting) + self.lost
        if unwritten:
            log.warning("%d lines of figures did not get into %s", unwritten, self.experiments.path)
        self.experiments.close()

    def _record_files(self, folder: Path | None, prefix: str) -> None:
        if folder is None or not folder.is_dir():
            return
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix != ".part":
                self.artefact(path, prefix + path.name)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if kind is None:
            self.finish()
        elif kind is KeyboardInterrupt:
            self.finish("interrupted", str(error))
        else:
            self.finish("failed", str(error))

    def _write_until_the_end(self) -> None:
        while not self._ending.wait(FLUSH_S):
            self._flush()

    def _flush(self) -> None:
        """Write everything that waits, or keep it waiting."""
        for _ in range(len(self._queue)):
            self._waiting.append(self._queue.popleft())
        rows = [row for line in self._waiting for row in self._rows(line)]
        changes = [self._changes[index] for index in range(len(self._changes))]
        try:
            with transaction(self.experiments.connection, self.experiments.path, SCHEMA) as db:
                db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
                db.execute(
                    "UPDATE runs SET updated = ?, step = ?, best = ?, best_step = ? WHERE id = ?",
                    (time.time(), self.step, *self.best, self.id),
                )
                for statement, values in changes:
                    db.execute(statement, values)
        except DatabaseError as error:
            self._warn(f"{error} (training continues, and its figures wait to be written)")
            self.lost += max(0, len(self._waiting) - MOST_WAITING)
            del self._waiting[:-MOST_WAITING]
            return
        self._waiting.clear()
        for _ in changes:
            self._changes.popleft()

    def _rows(self, line: _Line) -> list[tuple[object, ...]]:
        return [
            (
                self.id,
                line.kind,
                name,
                line.step,
                None if math.isnan(value) else float(value),
                line.time,
            )
            for name, value in line.values.items()
            if _is_number(value) and name != "step"
        ]

    def _warn(self, text: str) -> None:
        if not self.warned:
            log.warning("%s", text)
        self.warned = True


def open_run(
    settings: ExperimentSettings | None,
    *,
    trainer: str,
    name: str,
    params: Mapping[str, object],
    data: tuple[str | None, str | None] = (None, None),
    output: Path | None = None,
    headline: Headline = ("loss", "min"),
    after_step: int | None = None,
) -> Run | None:
    """Begin a run in the experiment log of the settings, or continue one.

    The other parameters are those of `ExperimentLog.begin`.

    Parameters
    ----------
    settings
        None, or a null `db`, means that nothing is recorded.

    Returns
    -------
    Run or None
        None where nothing is recorded.

    Raises
    ------
    DatabaseError
        The log cannot be opened or written.
    """
    if settings is None or settings.db is None:
        return None
    experiments = ExperimentLog(Path(settings.db), wait_s=settings.wait_s)
    try:
        row = experiments.begin(
            trainer,
            name,
            params,
            data=data,
            output=output,
            headline=headline,
            after_step=after_step,
        )
        return Run(experiments, row, settings.every)
    except BaseException:
        experiments.close()
        raise


def keep(files: Sequence[Path], folder: Path) -> None:
    """Link or copy files into a folder, and delete what else is there.

    Parameters
    ----------
    files
        In this order, so that whoever finds the last one finds the others too.

    Raises
    ------
    OSError
        A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        temp = folder / f"{path.name}.{os.getpid()}.part"
        temp.unlink(missing_ok=True)
        try:
            os.link(path, temp)
        except OSError:
            # Another file system, or one without links.
            shutil.copyfile(path, temp)
        os.replace(temp, folder / path.name)
        # Replacing a hard link by another one to the same file leaves both names.
        temp.unlink(missing_ok=True)
    fsync_folder(folder)
    names = {path.name for path in files}
    for other in folder.iterdir():
        if other.name not in names:
            other.unlink(missing_ok=True)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
