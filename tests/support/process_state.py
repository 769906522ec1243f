"""What a test may leave behind in the process that it shares with all other tests."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHECKED = ("WAREHOUSE_", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "PYTHON")
"""Prefixes of the environment variables that change what later tests, or processes started by them,
do. PyTorch and others set variables of their own, which stay."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def restored_commands() -> Iterator[None]:
    """Put back what a command sets once for its whole process: root logger, warnings, signals."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        for number, handler in signals.items():
            signal.signal(number, handler)


def shared_state() -> dict[str, Any]:
    """What no test may change for the next: variables, folder and number of PyTorch threads."""
    state: dict[str, Any] = {
        name: value for name, value in os.environ.items() if name.startswith(CHECKED)
    }
    state["working folder"] = os.getcwd()
    if hasattr(sys.modules.get("torch"), "get_num_threads"):
        state["PyTorch threads"] = sys.modules["torch"].get_num_threads()
    return state
