"""The ranks of one run: one process, or several started by torchrun that average their gradients.

Purpose: device, precision, process group, DDP wrapping, sums and maxima over ranks. With one
  process everything here is a no-op.
Used by: detector.inference.predictor, detector.training, features.finetuning.finetune_task,
  features.finetuning.run_finetuning, scripts.infer_view, scripts.train_detector,
  scripts.train_vqvae, segmentation.prediction, utils.training.held_out, utils.training.loop,
  utils.training.run.recording, utils.training.run.schedule, utils.training.run.step,
  vqvae.compress.codec, vqvae.training
Design notes: torchrun is recognised by RANK, LOCAL_RANK and WORLD_SIZE; NCCL on GPUs, gloo
  elsewhere. Only the first rank writes files and evaluates; the others wait in the next collective.
Assistant guidance: when extending: every rank must make the same collective calls in the same
  order, also on the way out.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from warehouse.errors import ConfigError

__all__ = ["Ranks", "autocast_dtype", "choose_device", "to_device"]

T = TypeVar("T")

# The last tensors that this module sent over the network. Gloo's own thread lets go of a tensor a
# moment after the exchange has returned. If it is the last to do so, it needs the GIL, and aborts
# the process ("terminate called without an active exception") where Python is just ending. As long
# as they are held here, it is never the last. DDP and the quantizers exchange by themselves, but an
# exchange of this module always follows.
_EXCHANGED: deque[Tensor] = deque(maxlen=32)


def _all_reduce(values: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> None:
    _EXCHANGED.append(values)
    torch.distributed.all_reduce(values, operation)


def _broadcast(values: Tensor) -> None:
    _EXCHANGED.append(values)
    torch.distributed.broadcast(values, src=0)


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """Return the device that a setting means.

    Parameters
    ----------
    wanted
        `auto` is a GPU where there is one, else the CPU; `cuda` is this rank's GPU.
    local_rank
        Number of the process on this machine.

    Raises
    ------
    ConfigError
        The device is not there.
    """
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        wanted = "cpu"
        if cuda:
            wanted = "cuda"
        elif torch.backends.mps.is_available():
            wanted = "mps"
    try:
        device = torch.device(wanted)
        if device == torch.device("cuda") and cuda:
            # Setting a device and a share of its memory need the number.
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
        # Making a device succeeds for any name; only an allocation shows whether it is there.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            "the device cannot be used",
            where=wanted,
            found=str(error).split("\n", 1)[0],
            remedy="use auto or cpu",
        ) from None
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what the forward pass computes in; None means float32.

    Parameters
    ----------
    precision
        `float32`, `bf16`, `fp16` or `auto`: bf16 on a GPU that has it, fp16 on one that has not,
        and float32 on the CPU.

    Raises
    ------
    ConfigError
        fp16 is wanted on a CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 needs a GPU", where="precision", remedy="use bf16 or float32")
    return {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the batch on the device."""
    if device.type == "cpu":
        return batch
    # From pinned memory the copy does not hold up this process. Images stay uint8: a quarter of
    # the bytes of float32.
    if device.type == "cuda":
        batch = {
            key: value if value.is_cuda or value.is_pinned() else value.pin_memory()
            for key, value in batch.items()
        }
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of one run, as one of them sees them.

    Attributes
    ----------
    rank
        Number of this process, in 0..count-1.
    count
        Number of processes.
    device
        Of this process.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> Ranks:
        """Join the group that torchrun describes in the environment, or be alone.

        Raises
        ------
        ConfigError
            The environment is incomplete, or the device is not there.
        """
        try:
            count = int(os.environ.get("WORLD_SIZE", "1"))
            rank = int(os.environ.get("RANK", "0"))
            local = int(os.environ.get("LOCAL_RANK", "0"))
        except ValueError:
            raise ConfigError(
                "RANK, LOCAL_RANK and WORLD_SIZE must be numbers",
                remedy="start several processes with torchrun",
            ) from None
        chosen = choose_device(device, local)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        if count > 1 and not torch.distributed.is_initialized():
            if "MASTER_ADDR" not in os.environ:
                raise ConfigError(
                    "WORLD_SIZE is set but MASTER_ADDR is not",
                    found=f"WORLD_SIZE={count}",
                    remedy="start with torchrun",
                )
            torch.distributed.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=count
            )
        return cls(rank, count, chosen)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and evaluates."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Return once every rank has come here, after the last exchange between them.

        DDP keeps the group, and with it Gloo's threads, alive to the end of the process. Waiting
        for the other ranks lets these threads finish their work before Python ends.
        """
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model, for several ranks in a wrapper that averages their gradients."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def sync(self, wrapped: nn.Module, *, when: bool) -> contextlib.AbstractContextManager[object]:
        """Return a context for a backward pass.

        Parameters
        ----------
        wrapped
            As `wrap` returned it.
        when
            Average the gradients over ranks; false leaves that to a later backward pass.
        """
        if when or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        context: contextlib.AbstractContextManager[object] = wrapped.no_sync()
        return context

    def total(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks; `values` is overwritten."""
        if self.count > 1:
            _all_reduce(values, torch.distributed.ReduceOp.SUM)
        return values

    def maximum(self, values: list[float]) -> list[float]:
        """Return the elementwise maximum over ranks.

        So all ranks know what one of them does: that time is up, or that Ctrl-C was pressed.
        """
        if self.count == 1:
            return values
        # Metal has no float64.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        shared = torch.tensor(values, dtype=dtype, device=self.device)
        _all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return [float(value) for value in shared.tolist()]

    def share(self, value: T) -> T:
        """Return the first rank's value on every rank.

        Parameters
        ----------
        value
            Of JSON types; that of the other ranks is not used.
        """
        if self.count == 1:
            return value
        # The others must know the length first: a broadcast fills a tensor that they made.
        text = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(text)], device=self.device)
        _broadcast(size)
        if self.first:
            data = torch.tensor(list(text), dtype=torch.uint8, device=self.device)
        else:
            data = size.new_empty(int(size), dtype=torch.uint8)
        _broadcast(data)
        shared: T = json.loads(bytes(data.tolist()))
        return shared
