"""When a run ends, and the learning rate until then.

Purpose: `Schedule` follows epochs or minutes; `stop_requests` turns the first Ctrl-C into a wish to
  stop.
Used by: utils.training.loop
Design notes: with a number of epochs the rate depends on the step alone, so that a run is
  repeatable, and minutes only end the session. Without one the rate follows the clock. SIGTERM is
  what schedulers and `docker stop` send; it means the same as Ctrl-C, so that both leave a
  checkpoint.
Assistant guidance: when extending: all ranks must decide the same; what one of them knows goes
  through `Ranks.maximum`. Signal handlers are put back on every way out.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils.log import get_log
from utils.training.ranks import Ranks
from utils.training.run.run_state import RunState
from utils.training.settings import TrainSettings

__all__ = ["Schedule", "stop_requests"]

log = get_log(__name__)


class Schedule:
    """The schedule of one session.

    Parameters
    ----------
    peak
        Highest learning rate.
    epoch_batches
        Batches in an epoch, of this rank.

    Attributes
    ----------
    stop
        Whether the user wants the run to stop.
    """

    def __init__(
        self, settings: TrainSettings, ranks: Ranks, *, peak: float, epoch_batches: int
    ) -> None:
        self.settings, self.ranks, self.peak = settings, ranks, peak
        self.steps_per_epoch = -(-epoch_batches // settings.accumulate)
        self.stop = False
        self.start, self.first_step = time.monotonic(), 0

    def begin(self, state: RunState) -> None:
        """Note where this session starts."""
        self.first_step = state.step

    def seconds(self, state: RunState) -> float:
        """Return what training took so far, former sessions included."""
        return state.seconds + time.monotonic() - self.start

    def steps_left(self, state: RunState) -> int | None:
        """Return the steps to the end of the schedule; None where the clock decides."""
        if self.settings.epochs is None:
            return None
        return max(0, self.settings.epochs * self.steps_per_epoch - state.step)

    def learning_rate(self, state: RunState) -> float:
        """Return the rate of the next step: a linear warm-up, then half a cosine down to 0."""
        settings = self.settings
        if settings.epochs is not None:
            share = state.step / max(1, settings.epochs * self.steps_per_epoch)
        else:
            assert settings.max_minutes is not None
            # The clocks of the ranks differ, their rates must not.
            share = self.ranks.maximum([self.seconds(state) / (60 * settings.max_minutes)])[0]
        risen = min(1.0, (state.step + 1) / (settings.warmup_steps + 1))
        return self.peak * risen * (0.5 + 0.5 * math.cos(math.pi * min(1.0, share)))

    def is_over(self, state: RunState) -> bool:
        """Return whether to stop now, the same on all ranks."""
        minutes, epochs = self.settings.max_minutes, self.settings.epochs
        spent, begun = self.seconds(state), True
        if epochs is not None:
            # Minutes limit the session. It makes one step at least, however short it is: a run of
            # short sessions would never end otherwise.
            spent -= state.seconds
            begun = state.step > self.first_step
        out_of_time = minutes is not None and begun and spent >= 60 * minutes
        if self.ranks.count > 1:
            flags = self.ranks.maximum([float(out_of_time), float(self.stop)])
            out_of_time, self.stop = flags[0] > 0, flags[1] > 0
        return self.stop or out_of_time or (epochs is not None and state.epoch >= epochs)

    def share_stop(self) -> bool:
        """Return whether the user stopped any rank; every rank has to call it."""
        self.stop = self.ranks.maximum([float(self.stop)])[0] > 0
        return self.stop

    def is_paused(self, state: RunState) -> bool:
        """Return whether minutes ended the session before the last epoch."""
        epochs = self.settings.epochs
        return not self.stop and epochs is not None and state.epoch < epochs

    def ask_to_stop(self) -> None:
        """End the run after the current step."""
        self.stop = True
        log.info("stopping after this step")


@contextmanager
def stop_requests(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` on the first SIGINT or SIGTERM in the block; later ones act as before.

    Does nothing outside the main thread, where no handler can be installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def first(*_: object) -> None:
        put_back()
        ask()

    for number in former:
        signal.signal(number, first)
    try:
        yield
    finally:
        put_back()
