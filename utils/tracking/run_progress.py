"""What a run tells people while it trains: a progress bar, lines on stderr, and its figures by step
and epoch.

Purpose: `RunProgress` hands the figures of each step and epoch to the bar, the log and the status
  file.
Used by: utils.training.loop
Design notes: speed is that of all ranks together, measured over the whole session, so that it does
  not jump from step to step.
Assistant guidance: when extending: everything here is called once a step; nothing may wait or
  synchronise a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from utils.log import Progress, get_log
from utils.tracking.run_log import LogValue, Phases, RunLog

__all__ = ["RunProgress"]

log = get_log(__name__)


class RunProgress:
    """Reports on a run.

    Parameters
    ----------
    phases
        The time spent, which the training loop adds up.
    ranks
        Number of processes that train together.
    every
        Steps between two writings of the status file.
    where
        Returns the counters and metrics that belong into the status file.
    """

    def __init__(
        self,
        run_log: RunLog,
        bar: Progress,
        phases: Phases,
        *,
        ranks: int,
        every: int,
        where: Callable[[], dict[str, LogValue]],
    ) -> None:
        self.run_log, self.bar, self.phases = run_log, bar, phases
        self.ranks, self.every, self.where = ranks, every, where

    @property
    def samples_per_second(self) -> float:
        """Of all ranks."""
        return self.phases.samples_per_second * self.ranks

    def step(
        self, step: int, epoch: int, *, loss: float, samples: int, figures: Mapping[str, float]
    ) -> None:
        """Report on a finished step.

        Parameters
        ----------
        loss
            A sample.
        figures
            Everything else that belongs into the step's line.
        """
        self.run_log.line(
            "step", step, epoch=epoch, samples=samples, **figures, **self.phases.next_step()
        )
        speed = self.samples_per_second
        shown: dict[str, LogValue] = {"samples/s": round(speed, 1), **self.phases.shares()}
        self.bar.advance(1, epoch=epoch, loss=loss, **shown)
        if step % self.every == 0:
            latest = {"loss": loss, "samples_per_second": round(speed, 2)}
            self.run_log.status("running", {**self.where(), **latest})

    def epoch(self, epoch: float, loss: float, metrics: Mapping[str, float]) -> None:
        """Tell people how a finished epoch, or the part of one, went."""
        scores = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        shares = ", ".join(f"{name} {share}" for name, share in self.phases.shares().items())
        log.info(
            "epoch %g: loss %.4f%s; %.1f samples/s, %s",
            epoch,
            loss,
            scores,
            self.samples_per_second,
            shares,
        )
