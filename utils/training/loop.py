"""The one training loop: every trainer brings a Task and a TrainSettings, and gets the rest from
here.

Purpose: epochs, mixed precision, accumulation, DDP under torchrun, schedule, running average,
  checkpoints, exact resume, timers.
Used by: detector.task, detector.training, features.finetuning.finetune_task,
  features.finetuning.run_finetuning, segmentation.task, segmentation.training, vqvae.task,
  vqvae.training
Design notes: a task's loss is a *sum over samples*; gradients are divided once, by the samples of
  the whole step. So accumulation, several ranks and `pad` repeats give what one big batch gives.
  Nothing random lives here: batches come from the loader's (seed, epoch), augmentation from (seed,
  epoch, sample), so a checkpoint of weights, optimizer and counters resumes bit for bit on a CPU.
  With `epochs: null` the schedule follows the clock, and then runs differ; with epochs,
  `max_minutes` only ends the session. Ctrl-C ends after the step at hand, with a checkpoint. Out of
  memory in a pass, batches go in halves, once, where a budget is given.
Assistant guidance: when extending: a task-specific word belongs into the task; keep one device
  synchronisation a step.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.caching.cached_passes import CachedPasses
from utils.log import get_log, progress
from utils.tracking.run_log import Phases, begin_journal
from utils.tracking.settings import ExperimentSettings
from utils.training.checkpoint import (
    COUNTERS,
    has_checkpoint,
    prefixed,
    restore_run,
    save_checkpoint,
)
from utils.training.memory_budget import MemoryBudget, is_shortage
from utils.training.optimizer import (
    RunningAverage,
    make_optimizer,
    optimizer_tensors,
    set_learning_rates,
)
from utils.training.ranks import Ranks, autocast_dtype, to_device
from utils.training.settings import MAY_CHANGE, TrainSettings
from utils.training.signals import stop_requests
from utils.training.task import BatchLoader, Task
from warehouse.errors import TrainingError

__all__ = ["Task", "Trainer", "seeded"]

log = get_log(__name__)
DRAW_EVERY_S, SAVE_EVERY_S = 30.0, 300.0


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initialise a model here: the global generator is seeded inside and put back after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Trainer:
    """One run. `run()` trains to the end of the schedule and returns the result; see TrainSettings
    for what decides the end.

    loader, held_out: objects with the ChunkLoader contract (iteration, len, set_epoch, state_dict,
    load_state_dict); held_out is used by the first rank only. open_seconds: what opening the store
    took, for the log. book: where the run is written down; None: nowhere. budget: of memory; None:
    neither watched nor answered. save_steps: steps between checkpoints; None: five minutes.
    """

    def __init__(
        self,
        task: Task,
        settings: TrainSettings,
        loader: BatchLoader,
        held_out: BatchLoader,
        output: Path,
        *,
        ranks: Ranks | None = None,
        open_seconds: float = 0.0,
        book: ExperimentSettings | None = None,
        budget: MemoryBudget | None = None,
        save_steps: int | None = None,
    ) -> None:
        self.task, self.settings, self.loader, self.output = task, settings, loader, output
        self.held_out = CachedPasses(
            held_out,
            settings.cache_transformed_tensors,
            settings.cache_limit_mb << 20,
            f"{task.name}, held-out",
        )
        self.ranks = ranks or Ranks.start(settings.device)
        self.device, self.open_seconds, self.book = self.ranks.device, open_seconds, book
        groups = task.groups(settings.weight_decay)
        if budget is not None:
            budget.require(task.model, groups, task.section)
        flat = all(parameter.ndim < 5 for parameter in task.model.parameters())
        self.model = task.model.to(
            self.device, memory_format=torch.channels_last if flat else torch.preserve_format
        )
        self.averaging = RunningAverage(self.model, settings.average, task.copied_modules())
        self.average = self.averaging.model
        self.lr = task.lr if settings.lr is None else settings.lr
        self.optimizer = make_optimizer(groups, self.lr)
        self.budget, self.save_steps, self.pieces = budget, save_steps, 1
        self.autocast = autocast_dtype(settings.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.phases = Phases()
        self.epoch = self.step = self.batches = 0
        self.epoch_batches = min(len(loader), settings.limit_batches or len(loader))
        self.epoch_loss, self.epoch_samples, self.spent_before = 0.0, 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.metrics: dict[str, float] = {}
        self.stop, self.drawn, self.saved, self.saved_step = False, 0.0, time.monotonic(), 0
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.spent_before + time.monotonic() - self.start

    def run(self) -> dict[str, Any]:
        """Raises TrainingError (out of memory, loss not finite), StateError (resume of something
        else); KeyboardInterrupt after Ctrl-C, once the checkpoint is written."""
        if self.epoch_batches == 0:
            raise TrainingError(
                "nothing to train on: the training split has no batches", remedy="lower batch_size"
            )
        if self.settings.resume:
            self._resume()
        self.first_step = self.step
        self.wrapped = self.ranks.wrap(self.model)
        self.journal = begin_journal(self)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        precision = str(self.autocast or torch.float32).removeprefix("torch.")
        log.info(
            "%s: %s parameters, %s, %s; store opened in %.2f s",
            self.task.name,
            parameters,
            self.device,
            precision,
            self.open_seconds,
        )
        try:
            with (
                stop_requests(self._ask_to_stop),
                progress(self._steps_left(), "steps", "train") as bar,
            ):
                while not self._over():
                    self._run_epoch(bar)
                paused = (
                    not self.stop
                    and self.settings.epochs is not None
                    and self.epoch < self.settings.epochs
                )
                if not self.metrics and not self.stop:
                    self._evaluate()
                    # An epoch that a later session ends gets its line there.
                    if not paused:
                        self._note_epoch()
            self._save("interrupted" if self.stop or paused else "done")
            if not (self.stop or paused):
                self._conclude()
        except BaseException as error:
            self.journal.failed(error, **self._where())
            raise
        finally:
            self.journal.close()
        again = "the same command" if self.settings.resume else f"--{self.task.section}.resume true"
        how = f"checkpoint written to {self.output}; go on with {again}"
        if self.stop:
            raise KeyboardInterrupt(how)
        if paused:
            log.info(
                "%g minutes are over at epoch %d of %d: %s",
                self.settings.max_minutes,
                self.epoch,
                self.settings.epochs,
                how,
            )
        return self.result() | {"finished": not paused}

    def _conclude(self) -> None:
        figures = self.task.conclude(self.average) if self.ranks.first else None
        figures = self.ranks.share(figures)
        if figures is not None:
            self.metrics |= figures
            self.journal.line("held_out", step=self.step, **self.metrics)

    def result(self) -> dict[str, Any]:
        return {
            **self.metrics,
            "checkpoint": str(self.output),
            "epochs": self.epoch,
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "samples_per_second": round(self.phases.samples_per_second * self.ranks.count, 2),
            "t_load_share": round(self.phases.load_share, 4),
        }

    def _over(self) -> bool:
        minutes, epochs = self.settings.max_minutes, self.settings.epochs
        # A session does one step at least, however short it is, or the run would never end.
        spent, moved = (
            (self.seconds, True)
            if epochs is None
            else (self.seconds - self.spent_before, self.step > self.first_step)
        )
        out_of_time = minutes is not None and moved and spent >= 60 * minutes
        if self.ranks.count > 1:
            flags = self.ranks.maximum([float(out_of_time), float(self.stop)])
            out_of_time, self.stop = flags[0] > 0, flags[1] > 0
        return self.stop or out_of_time or (epochs is not None and self.epoch >= epochs)

    def _steps_left(self) -> int | None:
        if self.settings.epochs is None:
            return None
        return max(
            0, self.settings.epochs * -(-self.epoch_batches // self.settings.accumulate) - self.step
        )

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to 0 over the epochs, or over the minutes when
        there are no epochs.
        """
        if self.settings.epochs is not None:
            share = self.step / max(
                1, self.settings.epochs * -(-self.epoch_batches // self.settings.accumulate)
            )
        else:
            assert self.settings.max_minutes is not None
            share = self.ranks.maximum([self.seconds / (60 * self.settings.max_minutes)])[0]
        warm = min(1.0, (self.step + 1) / (self.settings.warmup_steps + 1))
        return self.lr * warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, share)))

    def _run_epoch(self, bar: Any) -> None:
        if self.batches == 0:
            self.loader.set_epoch(self.epoch)
        self.metrics = {}
        self.task.before_epoch(self.epoch)
        source = iter(self.loader)
        try:
            while self.batches < self.epoch_batches:
                if self._run_step(source, bar) == 0:
                    break
                if self.batches < self.epoch_batches and self._over():
                    return
                if self._is_time_to_save():
                    self._save("running")
        finally:
            # Frees what the loader has fetched ahead; a plain iterator has nothing to free.
            if isinstance(source, Generator):
                source.close()
        self.epoch, self.batches = self.epoch + 1, 0
        self.loader.set_epoch(self.epoch)
        if self.epoch % self.settings.evaluate_every == 0 or self.epoch == self.settings.epochs:
            self._evaluate()
        self._note_epoch()
        self._save("running")

    def _is_time_to_save(self) -> bool:
        due = (
            time.monotonic() - self.saved > SAVE_EVERY_S
            if self.save_steps is None
            else self.step - self.saved_step >= self.save_steps
        )
        return self.ranks.first and due

    def _run_step(self, source: Iterator[dict[str, Tensor]], bar: Any) -> int:
        """One optimizer step over up to `accumulate` batches; how many batches it took."""
        group = min(self.settings.accumulate, self.epoch_batches - self.batches)
        rate, taken, kept, sums = (
            self._learning_rate(),
            0,
            list[dict[str, Tensor]](),
            dict[str, Tensor](),
        )
        self.model.train()
        while taken < group:
            batch = kept[taken] if taken < len(kept) else self._fetched(source)
            if batch is None:
                break
            if self.budget is not None and taken == len(kept):
                kept.append(batch)
            taken += 1
            if found := self._shortage(batch, sums, last=taken == group):
                # Out here nothing holds the failed pass any more, and the step can be done again
                # from its first batch.
                self._halve(found)
                taken, sums = 0, {}
        if taken:
            self._apply(taken, sums, rate, bar)
        return taken

    def _fetched(self, source: Iterator[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """The step's next batch as the loader gives it; None at the end."""
        with self.phases.time("load"):
            batch = next(source, None)
        if batch is not None:
            if self.phases.samples == 0:
                log.info("first batch after %.2f s", self.phases.total["load"])
            self.phases.samples += len(batch["index"])
        return batch

    def _shortage(self, batch: dict[str, Tensor], sums: dict[str, Tensor], *, last: bool) -> str:
        """Forward and backward pass of a batch; how memory ran out on the way, or nothing."""
        try:
            self._pass(batch, sums, last=last)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            return str(error).split("\n", 1)[0][:80] or "out of memory"
        return ""

    def _halve(self, found: str) -> None:
        """After an over-run: halves of batches from now on, once.

        Raises TrainingError where that is not the answer.
        """
        size, of = self.settings.batch_size, self.task.section
        half, more = max(1, size // (2 * self.pieces)), 2 * self.pieces * self.settings.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        if self.budget is None:
            raise TrainingError(
                "out of memory",
                where=f"step {self.step}",
                found=f"batch_size {size}",
                remedy=f"try --{of}.batch_size {half} --{of}.accumulate {more}",
            )
        if self.pieces > 1 or size == 1 or self.ranks.count > 1:
            raise TrainingError(
                "over the memory budget",
                where=f"step {self.step}, {-(-size // self.pieces)} at a time",
                found=found,
                remedy=f"raise --{of}.memory_budget_gb, or start anew with --{of}.batch_size {half} "
                f"--{of}.accumulate {more}",
            )
        self.pieces = 2
        self.budget.meter.trim()
        log.warning(
            "over the memory budget at step %d (%s): from here on %d samples at a time, and twice as many times a step",
            self.step,
            found,
            -(-size // 2),
        )

    def _pass(self, whole: dict[str, Tensor], sums: dict[str, Tensor], *, last: bool) -> None:
        """Gradients of a batch, a piece at a time.

        Its `samples`, `loss` and the loss's parts are added to `sums`.
        """
        part = -(-len(whole["index"]) // self.pieces)
        cuts = range(0, len(whole["index"]), part)
        for start in cuts:
            with self.phases.time("load"):
                piece = (
                    whole
                    if self.pieces == 1
                    else {key: value[start : start + part] for key, value in whole.items()}
                )
                batch = to_device(piece, self.device)
            synced = self.ranks.sync(self.wrapped, when=last and start == cuts[-1])
            with self.budget.watch() if self.budget else contextlib.nullcontext(), synced:
                with (
                    self.phases.time("fwd"),
                    torch.autocast(
                        self.device.type, self.autocast, enabled=self.autocast is not None
                    ),
                ):
                    loss, more = self.task.loss(self.wrapped, batch, self.epoch)
                with self.phases.time("bwd"):
                    self.scaler.scale(loss / self.settings.batch_size).backward()
            real = (
                (~batch["pad"]).sum()
                if "pad" in batch
                else torch.tensor(len(batch["index"]), device=self.device)
            )
            for name, value in {
                "samples": real.float(),
                "loss": loss.detach().float(),
                **more,
            }.items():
                sums[name] = sums.get(name, 0) + value

    def _apply(self, taken: int, sums: dict[str, Tensor], rate: float, bar: Any) -> None:
        """The optimizer's step on the gradients of `taken` batches.

        Raises TrainingError: what it began cannot be done again in halves.
        """
        with self.phases.time("opt"):
            try:
                values = self.ranks.total(torch.stack([*sums.values()]).double()).tolist()
                means = {
                    name: value / max(1.0, values[0])
                    for name, value in zip(sums, values, strict=True)
                    if name != "samples"
                }
                self._check_finite(means["loss"])
                figures = self._update(
                    rate, self.settings.batch_size * self.ranks.count / max(1.0, values[0])
                )
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_shortage(error):
                    raise
                of, found = self.task.section, str(error).split("\n", 1)[0][:80]
                more = (
                    f"raise --{of}.memory_budget_gb, or "
                    if self.budget and self.budget.limit is not None
                    else ""
                )
                raise TrainingError(
                    "out of memory in the optimizer's step",
                    where=f"step {self.step}",
                    found=found or None,
                    remedy=f"{more}start anew with a smaller model or --{of}.batch_size",
                ) from None
        self.step, self.batches = self.step + 1, self.batches + taken
        self.epoch_loss, self.epoch_samples = (
            self.epoch_loss + values[1],
            self.epoch_samples + int(values[0]),
        )
        self._report(bar, means | figures, rate, int(values[0]))

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                "the loss is not finite",
                where=f"step {self.step}",
                found=loss,
                remedy=f"lower --{self.task.section}.lr (now {self.lr:g})",
            )

    def _update(self, rate: float, factor: float) -> dict[str, float]:
        """Gradients become means over the step's samples, are clipped, applied, and the running
        average follows; the task's figures.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [
            parameter.grad for parameter in self.model.parameters() if parameter.grad is not None
        ]
        for gradient in gradients:
            gradient.mul_(factor)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        set_learning_rates(self.optimizer, rate, self.step, self.settings.warmup_steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        figures = self.task.after_step(self.step, self.epoch)
        self.averaging.update(self.model, self.step)
        return figures

    def _report(self, bar: Any, means: dict[str, float], rate: float, samples: int) -> None:
        timing = self.phases.next_step()
        self.journal.line(
            "step", step=self.step, epoch=self.epoch, samples=samples, lr=rate, **means, **timing
        )
        speed = self.phases.samples_per_second * self.ranks.count
        shares = {
            f"t_{name}": f"{spent / max(self.phases.seconds, 1e-9):.0%}"
            for name, spent in self.phases.total.items()
        }
        bar.advance(
            1, epoch=self.epoch, loss=means["loss"], **{"samples/s": round(speed, 1)}, **shares
        )
        if self.step % self.settings.log_interval == 0:
            self.journal.status(
                "running", loss=means["loss"], samples_per_second=round(speed, 2), **self._where()
            )

    def _where(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "epochs": self.settings.epochs,
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "output": str(self.output),
            **self.metrics,
        }

    def _evaluate(self) -> None:
        if self.ranks.first:
            self.metrics = self.task.evaluate(self.average, self._held_out_batches())
        self.metrics = self.ranks.share(self.metrics)

    def _held_out_batches(self) -> Iterator[dict[str, Tensor]]:
        self.held_out.set_epoch(0)
        for batch in itertools.islice(self.held_out, self.settings.limit_batches):
            yield to_device(batch, self.device)

    def _note_epoch(self) -> None:
        at = self.epoch + self.batches / self.epoch_batches
        if fresh := bool(self.epoch_samples or not self.history):
            loss = self.epoch_loss / max(1, self.epoch_samples)
            self.history.append(
                {
                    "epoch": round(at, 3),
                    "step": self.step,
                    "loss": loss,
                    "seconds": round(self.seconds, 1),
                }
            )
        # Time ran out just after an epoch that was not scored: its line gets the score. A finished
        # run scored again says nothing new.
        told = not fresh and self.metrics.items() <= self.history[-1].items()
        self.history[-1] |= self.metrics
        loss = self.history[-1]["loss"]
        self.epoch_loss, self.epoch_samples = 0.0, 0
        if not told:
            self.journal.line("epoch", **self.history[-1])
        spent = ", ".join(
            f"t_{name} {seconds / max(self.phases.seconds, 1e-9):.0%}"
            for name, seconds in self.phases.total.items()
        )
        if self.ranks.first:
            log.info(
                "epoch %g: loss %.4f%s; %.1f samples/s, %s",
                at,
                loss,
                "".join(f", {k} {v:.4g}" for k, v in self.metrics.items()),
                self.phases.samples_per_second * self.ranks.count,
                spent,
            )
            self.task.after_epoch(self.average, self.history)

    def _save(self, state: str) -> None:
        self.saved, self.saved_step = time.monotonic(), self.step
        if not self.ranks.first:
            return
        tensors = {
            **prefixed("model", self.model.state_dict()),
            **prefixed("average", self.average.state_dict()),
            **prefixed("optimizer", optimizer_tensors(self.optimizer)),
        }
        counters = {key: getattr(self, key) for key in COUNTERS} | {"pieces": self.pieces}
        meta = {
            "model": self.task.describe(),
            "settings": self._agreed(),
            "loader": self.loader.state_dict(),
            "counters": counters,
            "seconds": self.seconds,
            "history": self.history,
            "scaler": self.scaler.state_dict(),
        }
        save_checkpoint(self.output, tensors, meta)
        self.journal.saved(state, **self._where())
        if self.history and (state != "running" or time.monotonic() - self.drawn > DRAW_EVERY_S):
            self.task.draw(self.history, self.output / "curve.png")
            self.drawn = time.monotonic()

    def _agreed(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json", exclude=MAY_CHANGE) | {
            "lr": self.lr,
            "ranks": self.ranks.count,
        }

    def _resume(self) -> None:
        """Go on from the output folder's checkpoint; where there is none, start."""
        if not has_checkpoint(self.output):
            log.warning("nothing to resume in %s: starting from the first step", self.output)
            return
        restore_run(self, self._agreed())
        log.info("resumed %s at epoch %d, step %d", self.output, self.epoch, self.step)

    def _ask_to_stop(self) -> None:
        self.stop = True
        log.info("stopping after this step")
