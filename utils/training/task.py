"""What every trainer brings to the training loop: a Task, and settings that say when it ends.

Purpose: `Task`, the protocol of what is trained; `TrainSettings`, the keys that all trainers'
  sections share.
Used by: utils.training.loop
Design notes: trainers import both from utils.training.loop, which is where they are used. Optional
  parts of a task are looked up by name, so that a task that needs none of them stays five methods
  long. MAY_CHANGE is what a resumed run may have otherwise.
Assistant guidance: when extending: a new optional part is documented in Task; a setting that
  decides no loss goes into MAY_CHANGE.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator
from torch import Tensor, nn

from warehouse.format.schema import Section

__all__ = ["MAY_CHANGE", "Task", "TrainSettings"]

MAY_CHANGE = {
    "epochs",
    "max_minutes",
    "device",
    "log_interval",
    "evaluate_every",
    "status_file",
    "output",
    "resume",
    "warehouse",
}
MAY_CHANGE |= {"cache_transformed_tensors", "cache_limit_mb"}
"""Settings a resumed run may have otherwise; all others decide its losses."""


class TrainSettings(Section):
    """What every trainer's section has.

    `epochs: null` needs `max_minutes`, and then time alone decides.
    """

    epochs: int | None = Field(20, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1, le=65_536)
    lr: float | None = Field(None, gt=0, description="null: what suits the model")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float = Field(10.0, gt=0)
    average: float = Field(
        0.998,
        ge=0,
        lt=1,
        description="decay of the running average of the weights, which is what is kept; 0: none",
    )
    accumulate: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    log_interval: int = Field(10, ge=1)
    evaluate_every: int = Field(1, ge=1, description="epochs")
    status_file: str | None = None
    limit_batches: int | None = Field(None, ge=1)
    cache_transformed_tensors: bool | None = Field(
        None, description="held-out batches after their first pass; null: where all fit"
    )
    cache_limit_mb: int = Field(1024, ge=1)
    output: str | None = None
    resume: bool = False

    @model_validator(mode="after")
    def _something_ends_it(self) -> TrainSettings:
        if self.epochs is None and self.max_minutes is None:
            raise ValueError("with epochs null, max_minutes must say when to stop")
        return self


class Task(Protocol):
    """What a trainer brings. section: the settings section's name, for remedies; lr: stands in for
    a null one; model: on the CPU.

    A task may have `after_step(step, epoch) -> dict[str, float]`: called on every rank after each
    optimizer step, to update what follows no gradient; its figures go into the step's line. The
    running average copies modules with `copied_by_average` instead of averaging. It may have a
    `headline`, the metric that tells the book which epoch and run is best, such as ("ap50", "max");
    else it is the loss; `groups(weight_decay)`, the optimizer's groups in its own order, each with
    a `rate` (share of the learning rate) and a `start` (step of its warm-up);
    `before_epoch(epoch)`, also after a resume; `after_epoch(average, history)` on the first rank,
    once the epoch's line is written; and `conclude(average) -> dict[str, float]`, figures that
    decided nothing, when the schedule is through.
    """

    name: str
    section: str
    lr: float
    model: nn.Module

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the loss over the batch's real samples, and its detached parts (sums too).

        `model` may be wrapped for DDP.
        """

    def evaluate(self, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """Metrics of a model in eval mode on a whole pass of held-out batches, already on the
        device.
        """

    def describe(self) -> dict[str, Any]:
        """JSON that builds the same model again.

        A checkpoint with another description is refused on resume.
        """

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        """Draw loss and metrics by epoch as a PNG."""
