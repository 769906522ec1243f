"""A limit on the memory of a run: enforced by the allocator on a GPU, watched on a CPU.

Purpose: `MemoryBudget` refuses a model that cannot fit, raises `OverBudget` where a micro-batch
  took too much, and knows the peak.
Used by: features.finetuning.run_finetuning, utils.training.loop, utils.training.run.step
Design notes: on a GPU the limit is the share of its memory that PyTorch's allocator may reserve, so
  an over-run is its own error. On a CPU nothing can refuse an allocation; the limit is of the whole
  process, looked at after every micro-batch by the kernel's mark of the highest resident set
  (VmHWM), which is put back before each of them; where that is not possible, by the resident set as
  it is. The answer to an over-run, smaller micro-batches, is the training loop's: this module only
  measures.
Assistant guidance: when extending: a new device is a new Meter; figures are 10^9 bytes, as in the
  settings.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import torch
from torch import nn

from utils.training.optimizer import ParameterGroup
from warehouse.errors import TrainingError

__all__ = ["MemoryBudget", "Meter", "OverBudget", "is_shortage", "training_bytes"]

GB = 10**9
M_MMAP_THRESHOLD = -3
"""The number of this option of mallopt, from malloc.h."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class OverBudget(MemoryError):
    """More memory was taken than the budget allows; the training loop handles it."""


def is_shortage(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device or by the budget."""
    # PyTorch's allocator on the CPU and cuDNN raise a plain RuntimeError; only its words tell.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(words in str(error) for words in ("out of memory", "allocate memory"))
    )


class Meter(Protocol):
    """What measures the memory of a device, in bytes."""

    def reset(self) -> None:
        """Begin a new peak."""

    def now(self) -> int:
        """Return what is held now."""

    def peak(self) -> int:
        """Return the most that was held since the last reset."""

    def trim(self) -> None:
        """Give back what is free, so that it is not counted."""


class ProcessMeter:
    """The resident set of this process.

    Attributes
    ----------
    exact
        False where the kernel's mark cannot be put back.
    """

    def __init__(self) -> None:
        self.process, self.exact = psutil.Process(), True
        self.reset()

    def reset(self) -> None:
        # proc(5): writing 5 to clear_refs puts VmHWM back. Containers may mount /proc read-only.
        try:
            RESET.write_text("5")
        except OSError:
            self.exact = False

    def now(self) -> int:
        return int(self.process.memory_info().rss)

    def peak(self) -> int:
        if self.exact:
            with contextlib.suppress(OSError, ValueError, StopIteration):
                line = next(
                    line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")
                )
                return int(line.split()[1]) * 1024
        return self.now()

    def trim(self) -> None:
        gc.collect()
        # glibc keeps freed blocks, and they would count as taken. From here on blocks of 1 MiB and
        # more go back as soon as they are freed, which costs page faults; where memory is short
        # that is the better bargain.
        with contextlib.suppress(OSError, AttributeError):
            glibc = ctypes.CDLL(None)
            glibc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
            glibc.malloc_trim(0)


class CudaMeter:
    """What PyTorch's allocator has reserved on a GPU.

    The driver's own few hundred MB are not in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def now(self) -> int:
        return int(torch.cuda.memory_reserved(self.device))

    def peak(self) -> int:
        return int(torch.cuda.max_memory_reserved(self.device))

    def trim(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class MemoryBudget:
    """The memory that one run may take.

    On a GPU the limit is handed to the allocator here, before anything is put there.

    Parameters
    ----------
    limit_gb
        Limit in 10^9 bytes; None means that memory is only watched.
    meter
        None means the one that suits the device.
    """

    def __init__(
        self, limit_gb: float | None, device: torch.device, meter: Meter | None = None
    ) -> None:
        self.limit = None if limit_gb is None else int(limit_gb * GB)
        self.device = device
        on_gpu = device.type == "cuda"
        self.meter: Meter = meter or (CudaMeter(device) if on_gpu else ProcessMeter())
        self.highest = self.meter.peak()
        if self.limit is not None and on_gpu:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / total), device)

    @property
    def peak_gb(self) -> float:
        """The most that was held so far, in 10^9 bytes."""
        self.highest = max(self.highest, self.meter.peak())
        return round(self.highest / GB, 3)

    def require(self, model: nn.Module, groups: Sequence[ParameterGroup], section: str) -> int:
        """Return the bytes that training needs before the first image.

        To be asked while only the weights are there, on the CPU.

        Parameters
        ----------
        section
            The settings section, for the message.

        Raises
        ------
        TrainingError
            The limit is lower: no batch is small enough.
        """
        held, coming = training_bytes(model, groups)
        needed, inside = held + coming, ""
        if self.device.type == "cpu":
            # The process holds the weights already; only their average is to come.
            needed = self.meter.now() + held // 2 + coming
            inside = f", {self.meter.now() / GB:.2f} GB of it the process as it stands"
        if self.limit is not None and needed > self.limit:
            raise TrainingError(
                "the memory budget is below the model's own size",
                where=f"{section}.memory_budget_gb",
                expected=f"at least {needed / GB:.2f}"
                f" (weights, their average, gradients, optimizer{inside})",
                found=self.limit / GB,
                remedy=f"raise it, or unfreeze less with --{section}.blocks",
            )
        return needed

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the forward and backward pass of a micro-batch.

        Raises
        ------
        OverBudget
            The passes took more than the limit.
        """
        # Resetting the mark forgets the peak of what came before.
        self.highest = max(self.highest, self.meter.peak())
        self.meter.reset()
        yield
        taken = self.meter.peak()
        self.highest = max(self.highest, taken)
        if self.limit is not None and taken > self.limit:
            raise OverBudget(f"{taken / GB:.2f} GB")


def training_bytes(model: nn.Module, groups: Sequence[ParameterGroup]) -> tuple[int, int]:
    """Return the bytes that a model takes while it is trained, without activations.

    Returns
    -------
    tuple of int
        Of the weights and their running average; of gradients and AdamW's two moments, for the
        parameters in the groups.
    """
    weights = sum(
        value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()]
    )
    trained = sum(
        value.numel() * value.element_size() for group in groups for value in group.parameters
    )
    return 2 * weights, 3 * trained
