"""Ctrl-C and SIGTERM: a wish to stop, heard at a moment that suits.

Purpose: `stop_requests(ask)` turns the first signal into a call, the second into the interruption
  it would have been.
Used by: utils.training.loop
Design notes: SIGTERM is what schedulers and `docker stop` send; both signals mean the same here, so
  that both leave a checkpoint.
Assistant guidance: when extending: handlers are put back on every way out; off the main thread
  nothing can be installed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stop_requests"]


@contextmanager
def stop_requests(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM calls `ask`; from then on they act as they did before."""
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
