"""A run writes itself into the experiment book while it goes: figures by step, best checkpoint,
files, how it ended.

Purpose: `open_run` begins a `Run`; `Run.log` takes a line of figures; `Run.finish` (or the end of
  its `with` block) ends it.
Used by: features.heads.run_heads, utils.tracking.run_log, utils.training.loop
Design notes: a step only appends to a queue; a thread writes what has gathered, once a second and
  in one transaction, so that a slow disk or nine other runs never hold a step up. A book that
  cannot be opened is an error before training; one that breaks later is a warning, and log.jsonl
  still has every line. A killed run loses its last second. The best checkpoint is kept as a hard
  link under exp_<id>/checkpoints, so that it costs no disk until the trainer replaces its own.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from utils.log import get_log
from utils.tracking.database import transaction
from utils.tracking.experiment_log import SCHEMA, Book
from utils.tracking.settings import ExperimentSettings
from warehouse.errors import DatabaseError
from warehouse.format.durable import fsync_folder

__all__ = ["Run", "open_run"]

log = get_log(__name__)
FLUSH_S = 1.0
MOST_WAITING = 200_000
"""Lines kept for a book that cannot be written: about 100 MB of them."""


class Run:
    """One run being written; from `open_run`. A context manager: its end is `done`, `failed` or
    `interrupted`.

    `id`; `folder`: exp_<id> beside the book, for what belongs to the run. Nothing here raises when
    the book is locked or breaks: that is a warning, once. Not to be shared between threads or
    processes; every process opens its own.
    """

    def __init__(self, book: Book, row: Mapping[str, Any], every: int = 1) -> None:
        self.book, self.id, self.every = book, int(row["id"]), every
        self.headline, self.output = (
            str(row["headline"]),
            Path(row["output"]) if row["output"] else None,
        )
        self.sign = 1 if row["better"] == "max" else -1
        self.best: tuple[float | None, int | None] = (row["best"], row["best_step"])
        self.folder = book.path.parent / f"exp_{self.id}"
        self.step, self.lost, self.warned, self.ended = int(row["step"]), 0, False, False
        self._queue: deque[tuple[str, int, float, Mapping[str, Any]]] = deque()
        self._waiting: list[tuple[str, int, float, Mapping[str, Any]]] = []
        self._changes: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._ending = threading.Event()
        self._writer = threading.Thread(
            target=self._write_now_and_then, name=f"experiment-{self.id}", daemon=True
        )
        self._writer.start()

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Note a line's numbers under (kind, name, step); what is no number is left out, NaN
        becomes NULL.

        kind: `step`, `epoch` (held-out figures; these decide which is best) or one of your own.
        values is written later: hand over a mapping that nobody changes.
        """
        if kind == "step" and step % self.every:
            return
        if kind == "epoch":
            self._compare(step, values.get(self.headline))
        self.step = max(self.step, step)
        self._queue.append((kind, step, time.time(), values))

    def _compare(self, step: int, value: Any) -> None:
        if _is_number(value) and not math.isnan(value):
            best, at = self.best
            if best is None or self.sign * value > self.sign * best or step == at:
                self.best = (float(value), step)

    def saved(self, checkpoint: Path, step: int) -> None:
        """A checkpoint of `step` stands in the folder `checkpoint`.

        It is kept in exp_<id>/checkpoints when it is the best so far.
        """
        if self.best[1] != step:
            return
        try:
            keep(
                [
                    *sorted(checkpoint.glob("checkpoint-*.safetensors")),
                    checkpoint / "checkpoint.json",
                ],
                self.folder / "checkpoints",
            )
        except OSError as error:
            self._warn(f"the best checkpoint could not be kept in {self.folder}: {error.strerror}")

    def artefact(self, path: Path, name: str | None = None) -> None:
        """Note a file: absolute path, size, sha256, under `name` (default: the file's).

        One that cannot be read is a warning.
        """
        try:
            with open(path, "rb") as file:
                digest, size = (
                    hashlib.file_digest(file, "sha256").hexdigest(),
                    os.fstat(file.fileno()).st_size,
                )
        except OSError as error:
            self._warn(f"artefact {path}: {error.strerror}")
            return
        row = (self.id, name or path.name, str(path.resolve()), size, digest)
        self._changes.append(("INSERT OR REPLACE INTO artefacts VALUES (?, ?, ?, ?, ?)", row))

    def finish(
        self, state: Literal["done", "interrupted", "failed"] = "done", error: str | None = None
    ) -> None:
        """Write what is left, with the files of the output folder and the best checkpoint's, and
        close. A second call does nothing.
        """
        if self.ended:
            return
        self.ended = True
        self._ending.set()
        self._writer.join()
        best = self.folder / "checkpoints"
        for folder, prefix in ((self.output, ""), (best, "best/")):
            for path in sorted(folder.iterdir()) if folder and folder.is_dir() else []:
                if path.is_file() and path.suffix != ".part":
                    self.artefact(path, prefix + path.name)
        end = (state, error and error[:500], time.time(), self.id)
        self._changes.append(("UPDATE runs SET state = ?, error = ?, ended = ? WHERE id = ?", end))
        self._flush()
        if self._waiting or self.lost:
            log.warning(
                "%d lines of figures did not get into %s",
                len(self._waiting) + self.lost,
                self.book.path,
            )
        self.book.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        self.finish(
            "done" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed",
            str(error) if error else None,
        )

    def _write_now_and_then(self) -> None:
        while not self._ending.wait(FLUSH_S):
            self._flush()

    def _flush(self) -> None:
        for _ in range(len(self._queue)):
            self._waiting.append(self._queue.popleft())
        rows = [
            (self.id, kind, name, step, None if math.isnan(value) else float(value), at)
            for kind, step, at, values in self._waiting
            for name, value in values.items()
            if _is_number(value) and name != "step"
        ]
        changes = [self._changes[at] for at in range(len(self._changes))]
        try:
            with transaction(self.book.connection, self.book.path, SCHEMA) as db:
                db.executemany("INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
                now = (time.time(), self.step, *self.best, self.id)
                db.execute(
                    "UPDATE runs SET updated = ?, step = ?, best = ?, best_step = ? WHERE id = ?",
                    now,
                )
                for statement, values in changes:
                    db.execute(statement, values)
        except DatabaseError as error:
            self._warn(f"{error} (training goes on; its figures wait to be written)")
            self.lost += max(0, len(self._waiting) - MOST_WAITING)
            del self._waiting[:-MOST_WAITING]
            return
        self._waiting.clear()
        for _ in changes:
            self._changes.popleft()

    def _warn(self, text: str) -> None:
        if not self.warned:
            log.warning("%s", text)
        self.warned = True


def open_run(settings: ExperimentSettings | None, **about: Any) -> Run | None:
    """`Book.begin(**about)` in the book of the settings; None where they want none.

    Raises DatabaseError.
    """
    if settings is None or settings.db is None:
        return None
    book = Book(Path(settings.db), wait_s=settings.wait_s)
    try:
        return Run(book, book.begin(**about), settings.every)
    except BaseException:
        book.close()
        raise


def keep(files: list[Path], folder: Path) -> None:
    """Link (or copy) files into a folder, the last one last, then drop what else is there.

    Whoever reads the last finds the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        temp = folder / f"{path.name}.{os.getpid()}.part"
        temp.unlink(missing_ok=True)
        try:
            os.link(path, temp)
        except OSError:  # another file system, or one without links
            shutil.copyfile(path, temp)
        os.replace(temp, folder / path.name)
        temp.unlink(missing_ok=True)
    fsync_folder(folder)
    for other in folder.iterdir():
        if other.name not in {path.name for path in files}:
            other.unlink(missing_ok=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
