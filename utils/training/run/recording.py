"""What a run records of itself when it begins.

Purpose: `open_run_log` opens log.jsonl and begins the entry in the experiment log.
Used by: utils.training.loop
Design notes: the settings that are recorded are those in force: the learning rate is the task's
  where the settings give none, and device, ranks and number of parameters stand beside them.
Assistant guidance: when extending: settings recorded here are compared between runs; a value that
  differs each time, such as a date, does not belong among them.
"""

from __future__ import annotations

from pathlib import Path

from utils.tracking.experiments import Run, open_run
from utils.tracking.run_log import RunLog
from utils.tracking.settings import ExperimentSettings
from utils.training.ranks import Ranks
from utils.training.run.run_state import RunParts
from utils.training.settings import TrainSettings
from utils.training.task import BatchLoader, Task

__all__ = ["open_run_log"]


def open_run_log(
    task: Task,
    settings: TrainSettings,
    loader: BatchLoader,
    parts: RunParts,
    ranks: Ranks,
    *,
    lr: float,
    output: Path,
    experiments: ExperimentSettings | None,
    after_step: int | None,
) -> RunLog:
    """Open the log of a run.

    Parameters
    ----------
    lr
        The peak learning rate in force.
    output
        Folder of log.jsonl.
    experiments
        Where the run is recorded; None means nowhere.
    after_step
        Continue the former log after this step; None begins a new one.

    Raises
    ------
    DatabaseError
        The experiment log cannot be opened or written.
    TrainingError
        log.jsonl cannot be written.
    """
    run: Run | None = None
    # One entry for each run, not for each rank.
    if ranks.first:
        data = loader.state_dict()
        params = {
            **settings.model_dump(mode="json"),
            "lr": lr,
            "model": task.describe(),
            "run": {
                "device": str(ranks.device),
                "ranks": ranks.count,
                "parameters": parts.parameter_count,
            },
        }
        run = open_run(
            experiments,
            trainer=task.section,
            name=task.name,
            params=params,
            data=(data.get("version"), data.get("split")),
            output=output,
            headline=task.headline,
            after_step=after_step,
        )
    return RunLog(output, settings.status_file, active=ranks.first, after_step=after_step, run=run)
