"""What every trainer brings to the training loop: a Task.

Purpose: `Task`, the protocol of what is trained.
Used by: utils.training.loop
Design notes: trainers import it from utils.training.loop, which is where it is used. Optional
  parts of a task are looked up by name, so that a task that needs none of them stays five methods
  long.
Assistant guidance: when extending: a new optional part is documented in Task.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Task"]


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

    @property
    def model(self) -> nn.Module:
        """What is trained. Read-only, so that a task may declare its own class of module."""

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
