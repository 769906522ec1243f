"""One optimizer step: its passes, gradients over ranks, and what happens when memory runs out.

Purpose: `Stepper` turns batches into one update of the weights and says what came of it.
Used by: utils.training.loop
Design notes: a task's loss is a *sum over samples*; gradients are divided once, by the samples of
  the whole step. So accumulation, several ranks and repeated samples give what one large batch
  gives. If memory runs out in a pass and there is a budget, the step begins again with halved
  batches, once in a run. Without a budget, or in the optimizer, it is an error: there nothing
  smaller can be tried that would give the same step.
Assistant guidance: when extending: keep one device synchronisation a step, which is the transfer of
  the loss; every rank must make the same collective calls in the same order.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.log import get_log
from utils.tracking.run_log import Phases
from utils.training.memory_budget import MemoryBudget, is_shortage
from utils.training.optimizer import set_learning_rates
from utils.training.ranks import Ranks, to_device
from utils.training.run.run_state import RunParts, RunState
from utils.training.settings import TrainSettings
from utils.training.task import Batch, Task
from warehouse.errors import TrainingError

__all__ = ["StepResult", "Stepper"]

log = get_log(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step came to, over all ranks.

    Attributes
    ----------
    batches
        How many this rank took.
    samples
        Real samples.
    loss_sum
        Sum of the loss over them.
    means
        `loss` and its parts, a sample.
    figures
        Of `Task.after_step`.
    """

    batches: int
    samples: int
    loss_sum: float
    means: dict[str, float]
    figures: dict[str, float]


class Stepper:
    """Makes optimizer steps.

    Parameters
    ----------
    lr
        The peak rate, for a remedy.
    autocast
        What the forward pass computes in; None means float32.
    budget
        Of memory; None means that a shortage is an error.
    phases
        Where the time is added up.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        parts: RunParts,
        ranks: Ranks,
        *,
        lr: float,
        autocast: torch.dtype | None,
        budget: MemoryBudget | None,
        phases: Phases,
    ) -> None:
        self.task, self.settings, self.parts, self.ranks = task, settings, parts, ranks
        self.lr, self.budget, self.phases = lr, budget, phases
        self.autocast = autocast
        self.wrapped = ranks.wrap(parts.model)

    def step(
        self, source: Iterator[Batch], count: int, rate: float, state: RunState
    ) -> StepResult | None:
        """Make a step over up to `count` batches.

        Parameters
        ----------
        rate
            The learning rate.
        state
            Where the run stands. Only `micro_batches` is written.

        Returns
        -------
        StepResult or None
            None where the source is exhausted.

        Raises
        ------
        TrainingError
            Memory ran out and halving is not possible, or the loss is not finite.
        """
        self.parts.model.train()
        taken = 0
        kept: list[Batch] = []
        sums: dict[str, Tensor] = {}
        while taken < count:
            batch = kept[taken] if taken < len(kept) else self._fetch(source)
            if batch is None:
                break
            if self.budget is not None and taken == len(kept):
                kept.append(batch)
            taken += 1
            found = self._try_pass(batch, sums, state, last=taken == count)
            if found:
                # Not in the except block: there the failed pass would still hold its memory.
                self._halve(found, state)
                taken, sums = 0, {}
        return self._apply(taken, sums, rate, state) if taken else None

    def _fetch(self, source: Iterator[Batch]) -> Batch | None:
        with self.phases.time("load"):
            batch = next(source, None)
        if batch is not None:
            if self.phases.samples == 0:
                log.info("first batch after %.2f s", self.phases.total["load"])
            self.phases.samples += len(batch["index"])
        return batch

    def _try_pass(
        self, batch: Batch, sums: dict[str, Tensor], state: RunState, *, last: bool
    ) -> str:
        """Pass over a batch; return how memory ran out on the way, or an empty string."""
        try:
            self._pass(batch, sums, state, last=last)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            return str(error).split("\n", 1)[0][:80] or "out of memory"
        return ""

    def _halve(self, found: str, state: RunState) -> None:
        """Cut batches in halves from now on, once.

        Raises TrainingError where that is not the answer.
        """
        size, section = self.settings.batch_size, self.task.section
        half = max(1, size // (2 * state.micro_batches))
        more = 2 * state.micro_batches * self.settings.accumulate
        self.parts.optimizer.zero_grad(set_to_none=True)
        if self.budget is None:
            raise TrainingError(
                "out of memory",
                where=f"step {state.step}",
                found=f"batch_size {size}",
                remedy=f"try --{section}.batch_size {half} --{section}.accumulate {more}",
            )

        # Several ranks would have to agree on it before the next collective call.
        if state.micro_batches > 1 or size == 1 or self.ranks.count > 1:
            raise TrainingError(
                "over the memory budget",
                where=f"step {state.step}, {-(-size // state.micro_batches)} at a time",
                found=found,
                remedy=f"raise --{section}.memory_budget_gb, or start anew with"
                f" --{section}.batch_size {half} --{section}.accumulate {more}",
            )
        state.micro_batches = 2
        self.budget.meter.trim()
        log.warning(
            "over the memory budget at step %d (%s): from here on, the model is given %d samples"
            " at a time, twice as often in each step",
            state.step,
            found,
            -(-size // 2),
        )

    def _pass(self, batch: Batch, sums: dict[str, Tensor], state: RunState, *, last: bool) -> None:
        """Add the gradients of a batch, one micro-batch at a time.

        `samples`, `loss` and the parts of the loss are added to `sums`.
        """
        samples = len(batch["index"])
        size = -(-samples // state.micro_batches)
        starts = range(0, samples, size)
        for start in starts:
            with self.phases.time("load"):
                part = batch
                if state.micro_batches > 1:
                    part = {name: value[start : start + size] for name, value in batch.items()}
                part = to_device(part, self.ranks.device)
            # Gradients go over the ranks once a step, with its last backward pass.
            synced = self.ranks.sync(self.wrapped, when=last and start == starts[-1])
            watched = self.budget.watch() if self.budget else contextlib.nullcontext()
            with watched, synced:
                loss, terms = self._backward(part, state.epoch)
            if "pad" in part:
                real = (~part["pad"]).sum()
            else:
                real = torch.tensor(len(part["index"]), device=self.ranks.device)
            found = {"samples": real.float(), "loss": loss.detach().float(), **terms}
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value

    def _backward(self, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.ranks.device
        autocast = torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)
        with self.phases.time("fwd"), autocast:
            loss, terms = self.task.loss(self.wrapped, batch, epoch)
        with self.phases.time("bwd"):
            # A first division by a constant keeps the gradients within the range of fp16.
            scaled = self.parts.scaler.scale(loss / self.settings.batch_size)
            torch.autograd.backward(scaled)
        return loss, terms

    def _apply(
        self, taken: int, sums: dict[str, Tensor], rate: float, state: RunState
    ) -> StepResult:
        """Apply the gradients of `taken` batches.

        Raises TrainingError if memory runs out: what has begun cannot be done again in halves.
        """
        with self.phases.time("opt"):
            try:
                totals = self.ranks.total(torch.stack([*sums.values()]).double()).tolist()
                by_name = dict(zip(sums, totals, strict=True))
                samples = by_name.pop("samples")
                means = {name: value / max(1.0, samples) for name, value in by_name.items()}
                self._check_finite(means["loss"], state.step)
                # Undoes the division of `_backward`, and makes sums over all ranks means.
                factor = self.settings.batch_size * self.ranks.count / max(1.0, samples)
                figures = self._update(rate, factor, state)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_shortage(error):
                    raise
                raise self._optimizer_shortage(error, state.step) from None
        return StepResult(taken, int(samples), by_name["loss"], means, figures)

    def _optimizer_shortage(self, error: BaseException, step: int) -> TrainingError:
        section, remedy = self.task.section, ""
        if self.budget and self.budget.limit is not None:
            remedy = f"raise --{section}.memory_budget_gb, or "
        return TrainingError(
            "out of memory in the optimizer's step",
            where=f"step {step}",
            found=str(error).split("\n", 1)[0][:80] or None,
            remedy=f"{remedy}start anew with a smaller model or --{section}.batch_size",
        )

    def _check_finite(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                "the loss is not finite",
                where=f"step {step}",
                found=loss,
                remedy=f"lower --{self.task.section}.lr (now {self.lr:g})",
            )

    def _update(self, rate: float, factor: float, state: RunState) -> dict[str, float]:
        """Make gradients means over the step's samples, clip and apply them; the task's figures."""
        parts = self.parts
        parts.scaler.unscale_(parts.optimizer)
        for parameter in parts.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        nn.utils.clip_grad_norm_(parts.model.parameters(), self.settings.clip_norm)

        set_learning_rates(parts.optimizer, rate, state.step, self.settings.warmup_steps)
        parts.scaler.step(parts.optimizer)
        parts.scaler.update()
        parts.optimizer.zero_grad(set_to_none=True)

        figures = self.task.after_step(state.step, state.epoch)
        parts.average.update(parts.model, state.step)
        return figures
