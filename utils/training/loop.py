"""The training loop of all trainers: each brings a task, settings and batches.

Purpose: epochs, schedule, evaluation, checkpoints, exact resume, and what a run reports; mixed
  precision, accumulation and DDP are in `utils.training.run.step` and `utils.training.ranks`.
Used by: detector.training, features.finetuning.run_finetuning, segmentation.training,
  vqvae.training
Design notes: nothing random lives here: batches come from the loader's (seed, epoch), augmentation
  from (seed, epoch, sample), so a checkpoint of weights, optimizer and counters resumes bit for bit
  on a CPU. With `epochs: null` the schedule follows the clock, so that two runs differ; with a
  number of epochs, `max_minutes` only ends the session. Ctrl-C ends training after the current
  step, with a checkpoint.
Assistant guidance: when extending: whatever is specific to a model belongs into its task.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from utils.log import get_log, progress
from utils.tracking.run_log import LogValue, Phases, RunStatus
from utils.tracking.run_progress import RunProgress
from utils.tracking.settings import ExperimentSettings
from utils.training.held_out import Evaluator
from utils.training.memory_budget import MemoryBudget
from utils.training.ranks import Ranks, autocast_dtype
from utils.training.run.recording import open_run_log
from utils.training.run.run_state import RunCheckpoints, RunParts, RunState
from utils.training.run.schedule import Schedule, stop_requests
from utils.training.run.step import Stepper
from utils.training.settings import MAY_CHANGE, TrainSettings
from utils.training.task import Batch, BatchLoader, Task
from warehouse.errors import TrainingError

__all__ = ["Trainer"]

log = get_log(__name__)
DRAW_EVERY_S = 30.0


class Trainer:
    """One run; `run()` trains to the end of the schedule.

    Parameters
    ----------
    loader, held_out
        Batches to train on and to evaluate on. Only the first rank reads the latter.
    output
        Folder for the checkpoint, log.jsonl and curve.png.
    ranks
        None: as the environment says.
    open_seconds
        What opening the store took, for a message.
    experiments
        Where the run is recorded; None means nowhere.
    budget
        Of memory; None means that memory is neither watched nor limited.
    save_steps
        Steps between checkpoints; None means five minutes between them.

    Attributes
    ----------
    state
        Where the run stands.
    metrics
        Of the last evaluation; empty while an epoch is under way.
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
        experiments: ExperimentSettings | None = None,
        budget: MemoryBudget | None = None,
        save_steps: int | None = None,
    ) -> None:
        self.task, self.settings, self.loader, self.output = task, settings, loader, output
        self.ranks = ranks or Ranks.start(settings.device)
        self.open_seconds, self.experiments = open_seconds, experiments
        self.budget = budget
        self.lr = task.lr if settings.lr is None else settings.lr
        self.autocast = autocast_dtype(settings.precision, self.ranks.device)
        groups = task.groups(settings.weight_decay)
        if budget is not None:
            budget.require(task.model, groups, task.section)
        self.parts = RunParts.make(
            task,
            loader,
            groups,
            lr=self.lr,
            average=settings.average,
            device=self.ranks.device,
            scaled=self.autocast is torch.float16,
        )
        self.optimizer, self.scaler = self.parts.optimizer, self.parts.scaler

        self.evaluator = Evaluator(task, settings, held_out, self.ranks)
        self.checkpoints = RunCheckpoints(
            output, self.parts, task, self._shared_settings(), save_steps
        )
        self.state, self.phases = RunState(), Phases()
        self.epoch_batches = min(len(loader), settings.limit_batches or len(loader))
        self.metrics: dict[str, float] = {}
        self.drawn = 0.0
        self.schedule = Schedule(
            settings, self.ranks, peak=self.lr, epoch_batches=self.epoch_batches
        )

    def run(self) -> dict[str, object]:
        """Train to the end of the schedule, or of the session.

        Returns
        -------
        dict
            Metrics, `checkpoint`, `epochs`, `steps`, `seconds`, `samples_per_second`,
            `t_load_share`, and `finished`: False where `max_minutes` ended the session first.

        Raises
        ------
        TrainingError
            There are no batches, memory ran out, or the loss is not finite.
        StateError
            The checkpoint to be resumed is of another run.
        KeyboardInterrupt
            After Ctrl-C, once the checkpoint is written.
        """
        if self.epoch_batches == 0:
            raise TrainingError(
                "there is nothing to train on: the training split has no batches",
                remedy="lower batch_size",
            )
        # Before the log is opened, which a resumed run cuts back to the step of its checkpoint.
        if self.settings.resume:
            self.state = self.checkpoints.restore() or self.state
        self.schedule.begin(self.state)
        self.stepper = Stepper(
            self.task,
            self.settings,
            self.parts,
            self.ranks,
            lr=self.lr,
            autocast=self.autocast,
            budget=self.budget,
            phases=self.phases,
        )
        self.run_log = open_run_log(
            self.task,
            self.settings,
            self.loader,
            self.parts,
            self.ranks,
            lr=self.lr,
            output=self.output,
            experiments=self.experiments,
            after_step=self.state.step or None,
        )
        self._report_start()
        try:
            paused = self._train()
        except BaseException as error:
            # Ctrl-C too: without this a watcher would see `running` for ever.
            self.run_log.failed(error, self._where())
            raise
        finally:
            self.run_log.close()
        self._report_end(paused)
        self.ranks.wait_for_all()
        return self.result() | {"finished": not paused}

    def result(self) -> dict[str, object]:
        """Return what the run came to so far."""
        return {
            **self.metrics,
            "checkpoint": str(self.output),
            "epochs": self.state.epoch,
            "steps": self.state.step,
            "seconds": round(self.schedule.seconds(self.state), 1),
            "samples_per_second": round(self.phases.samples_per_second * self.ranks.count, 2),
            "t_load_share": round(self.phases.load_share, 4),
        }

    def _train(self) -> bool:
        """Train to the end of the schedule, or of the session; return whether the session ended."""
        steps = self.schedule.steps_left(self.state)
        with stop_requests(self.schedule.ask_to_stop), progress(steps, "steps", "train") as bar:
            self.progress = RunProgress(
                self.run_log,
                bar,
                self.phases,
                ranks=self.ranks.count,
                every=self.settings.log_interval,
                where=self._where,
            )
            while not self.schedule.is_over(self.state):
                self._run_epoch()
            stopped, paused = self.schedule.stop, self.schedule.is_paused(self.state)
            # Time may run out in the middle of an epoch; whoever presses Ctrl-C is waiting.
            if not self.metrics and not stopped:
                self._evaluate()
                # The line of an epoch that a later session ends is written by that session.
                if not paused:
                    self._note_epoch()
                # Ctrl-C during that evaluation: all ranks must agree, as they conclude together.
                stopped = self.schedule.share_stop()
        self._save("interrupted" if stopped or paused else "done")
        # Only once: these figures must not be looked at while anything can still be decided.
        if not (stopped or paused):
            self._conclude()
        return paused

    def _run_epoch(self) -> None:
        state = self.state
        if state.batches == 0:
            self.loader.set_epoch(state.epoch)
        self.metrics = {}
        self.task.before_epoch(state.epoch)
        source = iter(self.loader)
        try:
            while state.batches < self.epoch_batches:
                if not self._run_step(source):
                    break
                # The epoch is not complete: the session that completes it evaluates.
                if state.batches < self.epoch_batches and self.schedule.is_over(self.state):
                    return
                if self.ranks.first and self.checkpoints.is_due(self.state):
                    self._save("running")
        finally:
            # Frees what the loader has fetched ahead; a plain iterator has nothing to free.
            if isinstance(source, Generator):
                source.close()

        # The loader too, so that a checkpoint from here resumes at the start of the next epoch.
        state.epoch, state.batches = state.epoch + 1, 0
        self.loader.set_epoch(state.epoch)
        due = state.epoch % self.settings.evaluate_every == 0
        if due or state.epoch == self.settings.epochs:
            self._evaluate()
        self._note_epoch()
        self._save("running")

    def _run_step(self, source: Iterator[Batch]) -> bool:
        """Make one optimizer step; return whether there was anything left to train on."""
        # The last step of an epoch may have fewer batches: none is carried into the next one.
        count = min(self.settings.accumulate, self.epoch_batches - self.state.batches)
        rate = self.schedule.learning_rate(self.state)
        result = self.stepper.step(source, count, rate, self.state)
        if result is None:
            return False
        self.state.count_step(
            batches=result.batches, samples=result.samples, loss_sum=result.loss_sum
        )
        self.progress.step(
            self.state.step,
            self.state.epoch,
            loss=result.means["loss"],
            samples=result.samples,
            figures={"lr": rate, **result.means, **result.figures},
        )
        return True

    def _evaluate(self) -> None:
        # Inference loads the running average, so that is what decides which epoch is best.
        self.metrics = self.evaluator.evaluate(self.parts.average.model)

    def _note_epoch(self) -> None:
        state = self.state
        epoch = state.epoch + state.batches / self.epoch_batches
        new = state.note_epoch(epoch, self.schedule.seconds(state), self.metrics)
        line = state.history[-1]
        if new:
            rest = {key: value for key, value in line.items() if key != "step"}
            self.run_log.line("epoch", state.step, **rest)
        if self.ranks.first:
            self.progress.epoch(epoch, line["loss"], self.metrics)
            self.task.after_epoch(self.parts.average.model, state.history)

    def _conclude(self) -> None:
        own = self.task.conclude(self.parts.average.model) if self.ranks.first else None
        figures = self.ranks.share(own)
        if figures is not None:
            self.metrics |= figures
            self.run_log.line("held_out", self.state.step, **self.metrics)

    def _save(self, status: RunStatus) -> None:
        if not self.ranks.first:
            return
        self.checkpoints.save(self.state, self.schedule.seconds(self.state))
        self.run_log.saved(status, self.state.step, self._where())
        due = status != "running" or time.monotonic() - self.drawn > DRAW_EVERY_S
        if self.state.history and due:
            self.task.draw(self.state.history, self.output / "curve.png")
            self.drawn = time.monotonic()

    def _shared_settings(self) -> dict[str, object]:
        """The settings that a resumed run must share: all that decide its losses."""
        settings = self.settings.model_dump(mode="json", exclude=MAY_CHANGE)
        return settings | {"lr": self.lr, "ranks": self.ranks.count}

    def _where(self) -> dict[str, LogValue]:
        """What the status file says of the run."""
        return {
            "epoch": self.state.epoch,
            "epochs": self.settings.epochs,
            "step": self.state.step,
            "seconds": round(self.schedule.seconds(self.state), 1),
            "output": str(self.output),
            **self.metrics,
        }

    def _report_start(self) -> None:
        log.info(
            "%s: %s parameters, %s, %s; the store was opened in %.2f s",
            self.task.name,
            self.parts.parameter_count,
            self.ranks.device,
            str(self.autocast or torch.float32).removeprefix("torch."),
            self.open_seconds,
        )

    def _report_end(self, paused: bool) -> None:
        """Say how to continue; raises KeyboardInterrupt where the user stopped the run."""
        again = f"--{self.task.section}.resume true"
        if self.settings.resume:
            again = "the same command"
        how = f"the checkpoint is in {self.output}; continue with {again}"
        if self.schedule.stop:
            raise KeyboardInterrupt(how)
        if paused:
            log.info(
                "%g minutes are over at epoch %d of %d: %s",
                self.settings.max_minutes,
                self.state.epoch,
                self.settings.epochs,
                how,
            )
