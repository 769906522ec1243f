"""What a run leaves behind while it goes: a line a step, a status file for watchers, and where the
time went.

Purpose: `Journal` writes log.jsonl, the status file and the run's entry in the experiment book;
  `Phases` adds up the seconds of loading, forward, backward, optimizer.
Used by: utils.training.loop
Design notes: log.jsonl is append-only and is cut back to the checkpoint's step on resume, so that
  it never tells a step twice. The status file is replaced atomically and not fsynced: a watcher
  sees whole JSON, and a crash may lose the last second.
Assistant guidance: when extending: keep lines flat and short; a figure that needs a device
  synchronisation does not belong here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.tracking.experiments import Run, open_run
from warehouse.errors import TrainingError

__all__ = ["PHASES", "Journal", "Phases", "begin_journal"]

PHASES = ("load", "fwd", "bwd", "opt")


class Phases:
    """Seconds by phase, of the last step and in all.

    On a GPU a phase is the time to issue it, until the step's one sync.
    """

    def __init__(self) -> None:
        self.total = dict.fromkeys(PHASES, 0.0)
        self.step = dict.fromkeys(PHASES, 0.0)
        self.samples = 0

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.step[phase] += spent
            self.total[phase] += spent

    def next_step(self) -> dict[str, float]:
        """The finished step's `t_load t_fwd t_bwd t_opt`, in seconds."""
        done = {f"t_{phase}": round(spent, 6) for phase, spent in self.step.items()}
        self.step = dict.fromkeys(PHASES, 0.0)
        return done

    @property
    def seconds(self) -> float:
        return sum(self.total.values())

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def load_share(self) -> float:
        return self.total["load"] / self.seconds if self.seconds else 0.0


class Journal:
    """log.jsonl, the status file and the book's entry of one run.

    `active` is false on every rank but the first: nothing is written.
    """

    def __init__(
        self,
        folder: Path,
        status_file: str | None,
        *,
        active: bool,
        after_step: int | None,
        book: Run | None = None,
    ) -> None:
        """after_step: keep the former log's lines up to this step; None starts a new log. book.

        The run, ended by close().
        """
        self.folder, self.book, self.state, self.error = folder, book, "running", ""
        self.path = folder / "log.jsonl"
        self.status_path = Path(status_file) if status_file else None
        self.active = active
        if not active:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = _lines_until(self.path, after_step) if after_step is not None else []
            # Cut back in one go: a run killed before its first step leaves the former lines.
            temp = self.path.with_name(self.path.name + ".part")
            temp.write_text("".join(lines), encoding="utf-8")
            os.replace(temp, self.path)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if self.status_path is not None:
                self.status_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._end_book("failed", str(error))
            raise TrainingError(
                "the run's log cannot be written",
                where=error.filename,
                found=error.strerror,
                remedy="choose another output folder",
            ) from None

    def line(self, kind: str, **values: Any) -> None:
        if self.active:
            if self.book is not None:
                self.book.log(kind, values["step"], values)
            try:
                self.file.write(json.dumps({"kind": kind, **values}, allow_nan=False) + "\n")
                self.file.flush()
            except OSError as error:
                raise TrainingError(
                    "the run's log cannot be written",
                    where=self.path,
                    found=error.strerror,
                    remedy="free some space and go on with resume",
                ) from None

    def status(self, state: str, **values: Any) -> None:
        """state: running, done, interrupted or failed."""
        self.state, self.error = state, values.get("error", "")
        if not self.active or self.status_path is None:
            return
        text = json.dumps(
            {"state": state, "time": round(time.time(), 3), "pid": os.getpid(), **values}
        )
        try:
            temp = self.status_path.with_name(self.status_path.name + ".part")
            temp.write_text(text, encoding="utf-8")
            os.replace(temp, self.status_path)
        except (OSError, ValueError) as error:
            raise TrainingError(
                "the status file cannot be written",
                where=self.status_path,
                found=str(error)[:120],
                remedy="give the path of a file in a folder that can be written",
            ) from None

    def failed(self, error: BaseException, **values: Any) -> None:
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.status(state, error=str(error) or type(error).__name__, **values)

    def saved(self, state: str, **values: Any) -> None:
        """The status after a checkpoint was written to the folder."""
        self.status(state, **values)
        if self.book is not None:
            self.book.saved(self.folder, values["step"])

    def close(self) -> None:
        if self.active:
            self.file.close()
        self._end_book(self.state, self.error)

    def _end_book(self, state: str, error: str) -> None:
        if self.book is not None:
            self.book.finish(
                "done"
                if state == "done"
                else "interrupted"
                if state == "interrupted"
                else "failed",
                error or None,
            )


def begin_journal(trainer: Any) -> Journal:
    """The journal of a utils.training.loop.Trainer, with its entry in the book where it has one.

    Raises DatabaseError, TrainingError.
    """
    first, after_step = trainer.ranks.first, trainer.step or None
    book = _begin_run(trainer, after_step) if first else None
    return Journal(
        trainer.output, trainer.settings.status_file, active=first, after_step=after_step, book=book
    )


def _begin_run(trainer: Any, after_step: int | None) -> Run | None:
    task, state = trainer.task, trainer.loader.state_dict()
    how = {
        "device": str(trainer.device),
        "ranks": trainer.ranks.count,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    return open_run(
        trainer.book,
        trainer=task.section,
        name=task.name,
        params={
            **trainer.settings.model_dump(mode="json"),
            "lr": trainer.lr,
            "model": task.describe(),
            "run": how,
        },
        data=(state.get("version"), state.get("split")),
        output=trainer.output,
        headline=task.headline,
        after_step=after_step,
    )


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of a former log up to and including `step`; a torn last line is dropped."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                at = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue
            if line.endswith("\n") and isinstance(at, int) and at <= step:
                kept.append(line)
    return kept
