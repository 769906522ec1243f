"""Log lines go to the stderr of the moment, and a command's logging ends with its test."""

from __future__ import annotations

import io
import logging
import signal
import warnings

import pytest
from process_state import STOP_SIGNALS, restored_commands

from utils.log import get_log, start_logging


def test_a_line_goes_to_the_stderr_of_the_moment_also_after_the_former_one_was_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", first)
    start_logging()
    get_log("one").info("first %d", 1)
    assert first.getvalue() == "first 1\n"

    first.close()
    monkeypatch.setattr("sys.stderr", second)
    get_log("one").warning("second %d", 2)
    assert second.getvalue() == "warning: second 2\n"


def logging_and_signals() -> tuple[object, ...]:
    root = logging.getLogger()
    handlers = [handler for handler in root.handlers if "Stderr" in type(handler).__name__]
    signals = [signal.getsignal(number) for number in STOP_SIGNALS]
    return root.level, handlers, signals, warnings.showwarning


def test_a_command_s_logging_and_signals_end_with_its_block() -> None:
    before = logging_and_signals()
    with restored_commands():
        start_logging(logging.DEBUG)
        logging.captureWarnings(True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        during = logging_and_signals()
    assert during[0] == logging.DEBUG
    assert during[1]
    assert during != before
    assert logging_and_signals() == before
    assert warnings.showwarning.__module__ != "logging"


def test_every_test_runs_in_such_a_block(request: pytest.FixtureRequest) -> None:
    assert "_process_as_found" in request.fixturenames
