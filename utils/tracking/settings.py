"""The `experiments` and `runs` sections: where runs are recorded and how they are listed.

Purpose: `ExperimentSettings` for all trainers, `RunsSettings` for inspect_runs.
Used by: scripts._command, scripts.finetune, scripts.inspect_runs, scripts.segment_patches,
  scripts.train_detector, scripts.train_head, scripts.train_vqvae, utils.tracking.experiments,
  utils.tracking.run_report, utils.training.loop
Design notes: this module imports no torch, so that a command can print its `--help` quickly.
Assistant guidance: when extending: every key is listed in config.yaml with its default.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from warehouse.settings import Section

__all__ = ["ExperimentSettings", "RunsSettings"]


class ExperimentSettings(Section):
    """Where every trainer writes what it did."""

    db: str | None = Field("experiments/experiments.db", description="null: keep no book")
    wait_s: float = Field(
        20.0, gt=0, le=3600, description="seconds to wait for another process that is writing"
    )
    every: int = Field(
        1, ge=1, description="a row of figures for each so manieth step; epochs always have theirs"
    )


class RunsSettings(Section):
    """What inspect_runs shows."""

    trainer: str | None = Field(None, description="only runs of this section, such as detector")
    limit: int = Field(20, ge=1, description="the newest so many")
    compare: list[int] | None = Field(
        None, description="ids to set side by side; null: all that are listed"
    )
    metric: str | None = Field(
        None, description="what they are ranked and drawn by; null: each run's headline"
    )
    better: Literal["max", "min"] | None = Field(
        None, description="of the metric; null: as the runs say"
    )
    output: str | None = Field(None, description="PNG; null: compare.png beside the book")
    mlflow: str | None = Field(None, description="tracking URI to send the runs to; null: nowhere")
