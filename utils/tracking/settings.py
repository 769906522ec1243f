"""The `experiments` and `runs` sections: where runs are recorded and how they are listed.

Purpose: `ExperimentSettings` for all trainers, `RunsSettings` for inspect_runs.
Used by: detector.training, features.finetuning.run_finetuning, features.heads.run_heads,
  scripts._sections, scripts.finetune, scripts.inspect_runs, scripts.segment_patches,
  scripts.train_detector, scripts.train_head, scripts.train_vqvae, segmentation.training,
  utils.tracking.experiments, utils.tracking.run_report, utils.training.loop,
  utils.training.run.recording, vqvae.training
Design notes: this module imports no torch, so that a command can print its `--help` quickly.
Assistant guidance: when extending: every key is listed in config.yaml with its default.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from warehouse.section import Section

__all__ = ["ExperimentSettings", "RunsSettings"]


class ExperimentSettings(Section):
    """Where every trainer writes what it did."""

    db: str | None = Field(
        "experiments/experiments.db",
        description="SQLite file of the experiment log; null means that runs are not recorded.",
    )
    wait_s: float = Field(
        20.0, gt=0, le=3600, description="Seconds to wait for another process that is writing."
    )
    every: int = Field(
        1, ge=1, description="Record the metrics of every n-th step; epochs are always recorded."
    )


class RunsSettings(Section):
    """What `inspect_runs` shows."""

    trainer: str | None = Field(
        None, description="List only runs of this trainer, such as detector; null means all."
    )
    limit: int = Field(20, ge=1, description="Number of runs to list, newest first.")
    compare: list[int] | None = Field(
        None,
        description=(
            "Ids of the runs to compare, such as [3, 4]; null compares all that are listed."
        ),
    )
    metric: str | None = Field(
        None,
        description=(
            "Metric that ranks the runs and is plotted; null means the main metric of each run."
        ),
    )
    better: Literal["max", "min"] | None = Field(
        None,
        description=(
            "Whether the metric is better when larger (max) or smaller (min); null uses the "
            "direction recorded with the runs."
        ),
    )
    output: str | None = Field(
        None,
        description="PNG file of the curves; null means compare.png beside the experiment log.",
    )
    mlflow: str | None = Field(
        None, description="MLflow tracking URI to which the runs are sent; null sends nothing."
    )
