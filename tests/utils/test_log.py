"""Log lines go to the stderr of the moment, and a command's logging ends with its test."""

from __future__ import annotations

import io
import logging
import signal
import warnings

import pytest

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


def test_a_command_s_logging_and_signals_are_there_in_its_test() -> None:
    start_logging(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    assert logging.getLogger().level == logging.INFO


def test_and_not_in_the_next() -> None:
    root = logging.getLogger()
    assert root.level == logging.WARNING
    assert not [handler for handler in root.handlers if "Stderr" in type(handler).__name__]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert warnings.showwarning.__module__ != "logging"
