"""Short log lines and progress bars on stderr; stdout stays free for the result.

Purpose: the one way in which commands report what they are doing.
Used by: detector.inference.image_batches, detector.training, features.encoders.pretrained,
  features.feature_jobs, features.finetuning.run_finetuning, features.heads.cached,
  features.heads.run_heads, features.image_labels, features.run_extraction, scripts.bench_loader,
  scripts.build_zarr, scripts.compress_zarr, scripts.export_summary, scripts.infer_view,
  scripts.inspect_runs, scripts.inspect_zarr, scripts.make_sample, scripts.segment_patches,
  scripts.verify_zarr, segmentation.cutting, segmentation.prediction, utils.argyaml,
  utils.caching.cached_passes, utils.caching.tensor_cache, utils.config.environment,
  utils.jobs.bake_version, utils.jobs.derive, utils.jobs.publish_jobs, utils.jobs.run, utils.loader,
  utils.loading.device_copy, utils.tracking.experiments, utils.tracking.run_progress,
  utils.training.held_out, utils.training.loop, utils.training.run.run_state,
  utils.training.run.schedule, utils.training.run.step, vqvae.block_sampling, vqvae.quantizers.ema,
  vqvae.training
Design notes: a terminal gets a live bar with rate and time left; a pipe or a CI log gets a plain
  line every few seconds. Both go to stderr, so that `... | tail -n 1 | jq` works on any command.
Assistant guidance: when extending: no handlers on import; library code asks `get_log(__name__)` and
  never prints.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

__all__ = ["Progress", "get_log", "progress", "start_logging"]

PLAIN_EVERY_S = 5.0


class Progress(Protocol):
    """A progress bar, from `progress`."""

    def advance(self, n: int = 1, **fields: object) -> None:
        """Move the bar by `n` units, and show the fields beside it, as in ``loss=0.1``."""


def get_log(name: str) -> logging.Logger:
    """Return the logger of a module; its argument is ``__name__``."""
    return logging.getLogger(name)


def start_logging(level: int = logging.INFO) -> None:
    """Send the root logger's lines to stderr.

    Only commands call this, once each. A library that did so would override its user's logging.
    """
    handler = _StderrHandler()
    handler.setFormatter(_Short())
    root = logging.getLogger()
    # Replaced, not added: a second command in the same process would print every line twice.
    root.handlers[:] = [handler]
    root.setLevel(level)

    # Their INFO and WARNING lines are about their own workings, not about the user's data.
    for noisy in (
        "distributed",
        "asyncio",
        "tornado",
        "matplotlib",
        "PIL",
        "bokeh",
        "faster_coco_eval",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.captureWarnings(True)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Write to what `sys.stderr` is now, not to what it was when logging started.

    A notebook or a test runner may have replaced and closed that stream; each line would then be
    answered by "Logging error: I/O operation on closed file" and a traceback.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Short(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == "py.warnings":
            # captureWarnings hands over "path:line: Category: text\n  source line"; a user needs
            # the text only.
            text = text.split("\n", 1)[0].split("Warning: ", 1)[-1]
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return prefix + text


class _Plain:
    def __init__(self, total: int | None, unit: str, label: str) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()
        self.log = get_log("progress")

    def advance(self, n: int = 1, **fields: object) -> None:
        self.done += n
        now = time.monotonic()
        # Not every call: a CI log would otherwise get a line for each batch.
        if now - self.last >= PLAIN_EVERY_S:
            self.last = now
            self.log.info(self.line(now, fields))

    def line(self, now: float, fields: Mapping[str, object]) -> str:
        rate = self.done / max(now - self.start, 1e-9)
        of, left = "", ""
        if self.total is not None:
            seconds = (self.total - self.done) / max(rate, 1e-9)
            of, left = f"/{self.total}", f", {_clock(seconds)} left"
        speed = f"{rate:.1f} {self.unit}/s"
        return f"{self.label}: {self.done}{of} {self.unit}, {speed}{left}{_show(fields)}"


class _Bar:
    def __init__(self, bar: Any, task: Any, unit: str) -> None:
        self.bar, self.task, self.unit = bar, task, unit

    def advance(self, n: int = 1, **fields: object) -> None:
        task = self.bar.tasks[0]
        rate = (task.completed + n) / max(task.elapsed or 0.0, 1e-9)
        self.bar.update(
            self.task, advance=n, rate=f"{rate:.1f} {self.unit}/s", fields=_show(fields)
        )


@contextmanager
def progress(total: int | None, unit: str, label: str) -> Iterator[Progress]:
    """Show a bar with rate and time left, or plain lines when stderr is not a terminal.

    Parameters
    ----------
    total
        The number of units; None where it is not known.
    unit
        What is counted, for example "samples".
    label
        What is being done.
    """
    if not sys.stderr.isatty():
        yield _Plain(total, unit, label)
        return
    # Imported here: a pipe or a CI job never needs rich.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(label, total=total, rate="", fields=""), unit)


def _show(fields: Mapping[str, object]) -> str:
    return "".join(
        f" {key} {value:.4g}" if isinstance(value, float) else f" {key} {value}"
        for key, value in fields.items()
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
