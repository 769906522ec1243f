"""Where a run stands, and how that goes into a checkpoint and comes back.

Purpose: `RunState` holds the counters and the history of a run; `RunCheckpoints` writes and reads
  it together with the tensors of a `RunParts`.
Used by: utils.training.loop, utils.training.run.recording, utils.training.run.schedule,
  utils.training.run.step
Design notes: nothing random is stored, because order and augmentation follow from the seed and the
  counters. So weights, optimizer and counters are all that a bit-exact resume needs. A checkpoint
  of another model or of other settings is refused, with the first setting that differs.
Assistant guidance: when extending: a new counter needs a default for checkpoints that lack it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.log import get_log
from utils.training.checkpoint import (
    Checkpoint,
    has_checkpoint,
    load_checkpoint,
    load_module,
    prefixed,
    save_checkpoint,
)
from utils.training.optimizer import (
    ParameterGroup,
    RunningAverage,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from utils.training.task import BatchLoader, Task
from warehouse.errors import StateError

__all__ = ["RunCheckpoints", "RunParts", "RunState", "check_same_run"]

log = get_log(__name__)
SAVE_EVERY_S = 300.0
COUNTERS = ("epoch", "step", "batches", "epoch_samples")
LONG_LISTS = 400
"""Characters beyond which two lists that differ are told by their lengths."""


@dataclass
class RunState:
    """The counters of a run.

    Attributes
    ----------
    epoch, step
        How many are finished.
    batches
        How many of the epoch under way are trained on.
    epoch_loss, epoch_samples
        Sum of the loss and number of samples since the last line of the history.
    micro_batches
        Into how many parts a batch is cut, because memory ran out.
    seconds
        What former sessions took.
    history
        A line for each epoch: `epoch`, `step`, `loss`, `seconds`, metrics.
    """

    epoch: int = 0
    step: int = 0
    batches: int = 0
    epoch_loss: float = 0.0
    epoch_samples: int = 0
    micro_batches: int = 1
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def count_step(self, *, batches: int, samples: int, loss_sum: float) -> None:
        """Count a finished step.

        Parameters
        ----------
        batches
            Of this rank.
        samples, loss_sum
            Of all ranks.
        """
        self.step += 1
        self.batches += batches
        self.epoch_loss += loss_sum
        self.epoch_samples += samples

    def note_epoch(self, epoch: float, seconds: float, metrics: Mapping[str, float]) -> bool:
        """Add a line to the history, or metrics that came late to its last line.

        Parameters
        ----------
        epoch
            Epochs trained, with a fraction where the last one is not complete.

        Returns
        -------
        bool
            Whether the last line says anything new.
        """
        fresh = bool(self.epoch_samples or not self.history)
        if fresh:
            loss = self.epoch_loss / max(1, self.epoch_samples)
            line = {"epoch": round(epoch, 3), "step": self.step, "loss": loss}
            self.history.append({**line, "seconds": round(seconds, 1)})
        # Time may run out just after an epoch that was not scored: its line gets the score. A
        # finished run that is scored again has nothing new to say.
        new = fresh or not metrics.items() <= self.history[-1].items()
        self.history[-1] |= metrics
        self.epoch_loss, self.epoch_samples = 0.0, 0
        return new


@dataclass(frozen=True, slots=True)
class RunParts:
    """The objects of a run whose state belongs in a checkpoint."""

    model: nn.Module
    average: RunningAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: BatchLoader

    @classmethod
    def make(
        cls,
        task: Task,
        loader: BatchLoader,
        groups: Sequence[ParameterGroup],
        *,
        lr: float,
        average: float,
        device: torch.device,
        scaled: bool,
    ) -> RunParts:
        """Move a task's model to a device, and make what trains it there.

        Parameters
        ----------
        average
            Decay of the running average.
        scaled
            Whether the loss is scaled, as fp16 needs it.
        """
        model = task.model.to(device)
        # Channels-last is a format of four-dimensional weights; those of Conv3d have five.
        if all(parameter.ndim < 5 for parameter in model.parameters()):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # not in the stubs
        return cls(
            model,
            RunningAverage(model, average, task.copied_modules()),
            make_optimizer(groups, lr),
            torch.amp.GradScaler(device.type, enabled=scaled),
            loader,
        )

    @property
    def parameter_count(self) -> int:
        """Numbers in the parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class RunCheckpoints:
    """The checkpoints of a run in its output folder.

    Parameters
    ----------
    folder
        Each checkpoint replaces the one before.
    task
        Describes the model, and names the settings section.
    settings
        JSON values that a resumed run must share.
    every_steps
        Steps between two checkpoints; None means five minutes between them.
    """

    def __init__(
        self,
        folder: Path,
        parts: RunParts,
        task: Task,
        settings: Mapping[str, Any],
        every_steps: int | None,
    ) -> None:
        self.folder, self.parts, self.task = folder, parts, task
        self.settings, self.every_steps = settings, every_steps
        self.saved, self.saved_step = time.monotonic(), 0

    def is_due(self, state: RunState) -> bool:
        """Return whether the last checkpoint, or the start of the session, is long enough ago."""
        if self.every_steps is None:
            return time.monotonic() - self.saved > SAVE_EVERY_S
        return state.step - self.saved_step >= self.every_steps

    def save(self, state: RunState, seconds: float) -> None:
        """Write a checkpoint.

        Parameters
        ----------
        seconds
            What all sessions took, this one included.

        Raises
        ------
        TrainingError
            The folder cannot be written.
        """
        self.saved, self.saved_step = time.monotonic(), state.step
        parts = self.parts
        tensors = {
            **prefixed("model", parts.model.state_dict()),
            **prefixed("average", parts.average.model.state_dict()),
            **prefixed("optimizer", optimizer_tensors(parts.optimizer)),
        }
        counters: dict[str, float] = {key: getattr(state, key) for key in COUNTERS}
        # In the file micro-batches have an older name.
        counters |= {"epoch_loss": state.epoch_loss, "pieces": state.micro_batches}
        meta = {
            "model": self.task.describe(),
            "settings": dict(self.settings),
            "loader": parts.loader.state_dict(),
            "counters": counters,
            "seconds": seconds,
            "history": state.history,
            "scaler": parts.scaler.state_dict(),
        }
        save_checkpoint(self.folder, tensors, meta)

    def restore(self) -> RunState | None:
        """Put the parts back to where the checkpoint stopped.

        Returns
        -------
        RunState or None
            Where the run stood; None where the folder has no checkpoint.

        Raises
        ------
        StateError
            The checkpoint is of another run, or does not say where it stopped.
        ConfigError, CorruptError
            As `load_checkpoint`.
        """
        if not has_checkpoint(self.folder):
            log.warning("there is nothing to resume in %s: starting from step 0", self.folder)
            return None
        saved, parts = load_checkpoint(self.folder), self.parts
        self._check_same_run(saved)
        try:
            state = _read_state(saved.meta)
            loader, scaler = dict(saved.meta["loader"]), dict(saved.meta["scaler"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                "the checkpoint does not say where the run stopped",
                where=saved.path,
                found=str(error),
            ) from None

        load_module(parts.model, saved.part("model"), saved.path)
        load_module(parts.average.model, saved.part("average"), saved.path)
        restore_optimizer(parts.optimizer, saved.part("optimizer"), saved.path)
        # Empty where the scaler is not enabled.
        if scaler:
            parts.scaler.load_state_dict(scaler)
        parts.loader.load_state_dict(loader)
        log.info("resumed %s at epoch %d, step %d", self.folder, state.epoch, state.step)
        return state

    def _check_same_run(self, saved: Checkpoint) -> None:
        former = saved.meta.get("settings", {})
        # The model first: where it differs, its settings differ too and say less.
        pairs = {"model": (self.task.describe(), saved.meta.get("model"))}
        pairs |= {key: (value, former.get(key)) for key, value in self.settings.items()}
        remedy = f"repeat the setting, or choose another --{self.task.section}.output"
        check_same_run(saved, pairs, remedy)


def check_same_run(
    saved: Checkpoint, pairs: Mapping[str, tuple[object, object]], remedy: str
) -> None:
    """Compare what a run and a checkpoint say of themselves.

    Parameters
    ----------
    pairs
        JSON values by name: of the run, and of the checkpoint.

    Raises
    ------
    StateError
        Two values differ; names the first place where they do.
    """
    for key, (now, then) in pairs.items():
        if now == then:
            continue
        place, expected, found = _first_difference(key, now, then)
        raise StateError(
            "the checkpoint is of another run",
            where=f"{saved.path}, {place}",
            expected=expected,
            found=found,
            remedy=remedy,
        )


def _read_state(meta: dict[str, Any]) -> RunState:
    counters = meta["counters"]
    return RunState(
        **{key: int(counters[key]) for key in COUNTERS},
        epoch_loss=float(counters["epoch_loss"]),
        micro_batches=int(counters.get("pieces", 1)),
        seconds=float(meta["seconds"]),
        history=list(meta["history"]),
    )


def _first_difference(place: str, now: Any, then: Any) -> tuple[str, Any, Any]:
    """Where two JSON values differ, and what stands there, short enough for a line."""
    if isinstance(now, dict) and isinstance(then, dict):
        # `kind` first: in another kind of model everything else differs too.
        keys = sorted({*now, *then}, key=lambda key: (key != "kind", str(key)))
        differing = (
            key for key in keys if key not in now or key not in then or now[key] != then[key]
        )
        key = next(differing)
        return _first_difference(f"{place}.{key}", now.get(key), then.get(key))

    if isinstance(now, list) and isinstance(then, list):
        if len(now) == len(then):
            index = next(index for index, value in enumerate(now) if value != then[index])
            return _first_difference(f"{place}.{index}", now[index], then[index])
        if len(str([now, then])) > LONG_LISTS:
            return place, f"{len(now)} entries", f"{len(then)} entries"

    return place, "null" if now is None else now, "null" if then is None else then
