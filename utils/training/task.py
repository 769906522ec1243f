"""What a trainer brings to the training loop: a task, and batches.

Purpose: `Task`, the base class of what is trained, with a default for every optional part;
  `BatchLoader`, the protocol of what the batches come from; `seeded`, for fresh weights.
Used by: detector.task, features.finetuning.finetune_task, segmentation.task,
  utils.training.held_out, utils.training.loop, utils.training.run.recording,
  utils.training.run.run_state, utils.training.run.step, vqvae.task
Design notes: a task without optional parts overrides five methods. The defaults do nothing or what
  suits most models, so the loop calls every part without asking whether it is there.
Assistant guidance: when extending: a new optional part is a method here whose default changes
  nothing for the tasks that exist.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from utils.training.optimizer import ParameterGroup, parameter_groups

__all__ = ["Batch", "BatchLoader", "Task", "seeded"]

Batch = dict[str, Tensor]
"""Arrays by name. `index` int64 [B] is always there; `pad` bool [B] marks repeated samples."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator in the block, to initialise a model, and restore it after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class BatchLoader(Protocol):
    """The part of `utils.loader.ChunkLoader` that training relies on."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def set_epoch(self, epoch: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(ABC):
    """A model with its loss and metrics.

    Attributes
    ----------
    name
        Of the run, for people.
    section
        The settings section of the trainer; messages name its keys.
    lr
        Peak learning rate where the settings give none.
    headline
        The metric that decides which epoch and which run is best, and whether more is better.
    model
        What is trained, on the CPU until the loop moves it.
    """

    name: str
    section: str
    lr: float
    headline: tuple[str, Literal["min", "max"]] = ("loss", "min")
    model: nn.Module

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the loss over the batch's real samples, and its parts.

        Parameters
        ----------
        model
            `self.model`, which may be wrapped for DDP.
        batch
            On the model's device.

        Returns
        -------
        tuple
            A scalar with a gradient; detached scalars by name, sums over the same samples.

        Notes
        -----
        Sums and not means: gradients are divided once, by the samples of the whole step, so
        that accumulation and several ranks give what one large batch gives.
        """

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Return the metrics of a model in eval mode.

        Parameters
        ----------
        model
            The running average of `self.model`.
        batches
            One pass over the held-out split, on the model's device.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return JSON from which the same model can be built.

        A checkpoint with another description is refused on resume.
        """

    @abstractmethod
    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        """Draw loss and metrics by epoch as a PNG.

        Parameters
        ----------
        history
            A line for each epoch: `epoch`, `step`, `loss`, `seconds` and the metrics.
        """

    def groups(self, weight_decay: float) -> list[ParameterGroup]:
        """Return the optimizer's groups, in an order that every run repeats."""
        return parameter_groups(self.model, weight_decay)

    def copied_modules(self) -> Collection[nn.Module]:
        """Return the parts of the model that the running average copies.

        They are averages already, such as codebooks; all other parts are averaged.
        """
        return ()

    def before_epoch(self, epoch: int) -> None:  # noqa: B027 - optional
        """Prepare the model for an epoch; also called where a run resumes in the middle of one."""

    def after_step(self, step: int, epoch: int) -> dict[str, float]:
        """Update what follows no gradient, after an optimizer step on every rank.

        Returns
        -------
        dict of str to float
            Figures for the step's line of the log.
        """
        return {}

    def after_epoch(  # noqa: B027 - optional
        self, average: nn.Module, history: list[dict[str, Any]]
    ) -> None:
        """Act on a finished epoch, on the first rank, once its line is in `history`."""

    def conclude(self, average: nn.Module) -> dict[str, float] | None:
        """Return figures that decided nothing, once, at the end of the schedule.

        Called on the first rank. None means that there are none.
        """
        return None
