"""What a run writes while it trains: log.jsonl, a status file, and figures for the experiment log.

Purpose: `RunLog` writes log.jsonl, the status file and the run's entry in the experiment log;
  `Phases` adds up the seconds of loading, forward pass, backward pass and optimizer.
Used by: utils.tracking.run_progress, utils.training.loop, utils.training.run.recording,
  utils.training.run.step
Design notes: log.jsonl is append-only. On resume it is cut back to the checkpoint's step, so that
  no step is in it twice. The status file is replaced atomically and not fsynced: a watcher always
  reads complete JSON, and a crash may lose the last second.
Assistant guidance: when extending: keep lines flat and short; a figure that needs a device
  synchronisation does not belong here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from utils.tracking.experiments import Run
from warehouse.errors import TrainingError

__all__ = ["PHASES", "LogValue", "Phases", "RunLog", "RunStatus"]

LogValue = int | float | str | None
RunStatus = Literal["running", "done", "interrupted", "failed"]

PHASES = ("load", "fwd", "bwd", "opt")


class Phases:
    """Seconds by phase, of the last step and of the whole session.

    On a GPU a phase is the time to issue its work, because a step synchronises only once.

    Attributes
    ----------
    samples
        How many were loaded; counted by the owner.
    """

    def __init__(self) -> None:
        self.total = dict.fromkeys(PHASES, 0.0)
        self.step = dict.fromkeys(PHASES, 0.0)
        self.samples = 0

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.step[phase] += spent
            self.total[phase] += spent

    def next_step(self) -> dict[str, float]:
        """Return `t_load t_fwd t_bwd t_opt` of the finished step in seconds, and begin another."""
        done = {f"t_{phase}": round(spent, 6) for phase, spent in self.step.items()}
        self.step = dict.fromkeys(PHASES, 0.0)
        return done

    def shares(self) -> dict[str, str]:
        """Return `t_load t_fwd t_bwd t_opt` of the session as percentages, for people."""
        return {
            f"t_{phase}": f"{spent / max(self.seconds, 1e-9):.0%}"
            for phase, spent in self.total.items()
        }

    @property
    def seconds(self) -> float:
        """Of all phases together."""
        return sum(self.total.values())

    @property
    def samples_per_second(self) -> float:
        """Of this process; 0 before the first step."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def load_share(self) -> float:
        """Share of the time that was spent waiting for batches, in [0, 1]."""
        return self.total["load"] / self.seconds if self.seconds else 0.0


class RunLog:
    """log.jsonl, the status file and the experiment log's entry of one run.

    Parameters
    ----------
    folder
        Where log.jsonl goes; made if it is not there.
    status_file
        JSON file for watchers; None means none.
    active
        Whether anything is written: true on the first rank only.
    after_step
        Keep the lines of the former log up to this step; None starts a new log.
    run
        The run's entry in the experiment log, which `close` ends; None means none.

    Raises
    ------
    TrainingError
        The log cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        status_file: str | None,
        *,
        active: bool,
        after_step: int | None,
        run: Run | None = None,
    ) -> None:
        self.folder, self.run = folder, run
        self.state: RunStatus = "running"
        self.error = ""
        self.path = folder / "log.jsonl"
        self.status_path = Path(status_file) if status_file else None
        self.active = active
        if not active:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = _lines_until(self.path, after_step) if after_step is not None else []
            # Replaced in one go: a run killed before its first step leaves the former lines.
            temp = self.path.with_name(self.path.name + ".part")
            temp.write_text("".join(lines), encoding="utf-8")
            os.replace(temp, self.path)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
            if self.status_path is not None:
                self.status_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._end_run("failed", str(error))
            raise TrainingError(
                "the log of the run cannot be written",
                where=error.filename,
                found=error.strerror,
                remedy="choose another output folder",
            ) from None

    def line(self, kind: str, step: int, **values: LogValue) -> None:
        """Append a line to log.jsonl, and its numbers to the experiment log.

        Raises
        ------
        TrainingError
            The log cannot be written.
        """
        if not self.active:
            return
        line = {"step": step, **values}
        if self.run is not None:
            self.run.log(kind, step, line)
        try:
            self.file.write(json.dumps({"kind": kind, **line}, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise TrainingError(
                "the log of the run cannot be written",
                where=self.path,
                found=error.strerror,
                remedy="free some space and continue with resume",
            ) from None

    def status(self, state: RunStatus, values: Mapping[str, LogValue], *, error: str = "") -> None:
        """Replace the status file.

        Parameters
        ----------
        values
            Where the run stands, for watchers.

        Raises
        ------
        TrainingError
            The status file cannot be written.
        """
        self.state, self.error = state, error
        if not self.active or self.status_path is None:
            return
        status = {"state": state, "time": round(time.time(), 3), "pid": os.getpid(), **values}
        if error:
            status["error"] = error
        try:
            temp = self.status_path.with_name(self.status_path.name + ".part")
            temp.write_text(json.dumps(status), encoding="utf-8")
            os.replace(temp, self.status_path)
        except (OSError, ValueError) as failure:
            raise TrainingError(
                "the status file cannot be written",
                where=self.status_path,
                found=str(failure)[:120],
                remedy="give the path of a file in a folder that can be written",
            ) from None

    def failed(self, error: BaseException, values: Mapping[str, LogValue]) -> None:
        """Write the status of a run that an exception ends."""
        state: RunStatus = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.status(state, values, error=str(error) or type(error).__name__)

    def saved(self, state: RunStatus, at_step: int, values: Mapping[str, LogValue]) -> None:
        """Write the status after a checkpoint of step `at_step` was written to the folder."""
        self.status(state, values)
        if self.run is not None:
            self.run.saved(self.folder, at_step)

    def close(self) -> None:
        """Close log.jsonl, and end the run in the experiment log in its last state."""
        if self.active:
            self.file.close()
        self._end_run(self.state, self.error)

    def _end_run(self, state: RunStatus, error: str) -> None:
        if self.run is None:
            return
        # A log that is closed while it says `running` belongs to a run that broke off.
        self.run.finish("failed" if state == "running" else state, error or None)


def _lines_until(path: Path, step: int) -> list[str]:
    """The complete lines of a former log up to and including `step`.

    A last line that a crash has torn is dropped.
    """
    kept: list[str] = []
    if not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            found = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if line.endswith("\n") and isinstance(found, int) and found <= step:
            kept.append(line)
    return kept
