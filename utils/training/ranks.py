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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from warehouse.errors import ConfigError

__all__ = ["Ranks", "autocast_dtype", "choose_device", "to_device"]


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` is a GPU where there is one, else the CPU; `cuda` is this rank's GPU.

    Raises ConfigError for a device that is not there.
    """
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        wanted = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        if device == torch.device("cuda") and cuda:
            # Setting a device and a share of its memory need the number.
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
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
    """What `auto`, `float32`, `bf16` or `fp16` means on a device; None is float32.

    `auto`: bf16 on a GPU that has it, fp16 on one that has not, float32 on the CPU. Raises
    ConfigError for fp16 on a CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 needs a GPU", where="precision", remedy="use bf16 or float32")
    return {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on the device, through pinned memory to a GPU.

    Pictures stay uint8, a quarter of the bytes.
    """
    if device.type == "cpu":
        return batch
    if device.type == "cuda":
        batch = {
            key: value if value.is_cuda or value.is_pinned() else value.pin_memory()
            for key, value in batch.items()
        }
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


@dataclass(frozen=True, slots=True)
class Ranks:
    """rank 0..count-1 of `count` processes, and this process's device."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto") -> Ranks:
        """Join the group torchrun describes in the environment, or be alone."""
        try:
            count, rank, local = (
                int(os.environ.get(key, default))
                for key, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
            )
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
        return self.rank == 0

    def close(self) -> None:
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device.index] if self.device.type == "cuda" else None
        )

    def sync(self, wrapped: nn.Module, *, when: bool) -> Any:
        """A context in which backward averages the gradients over ranks, or leaves that to a later
        one.
        """
        if when or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values

    def maximum(self, values: list[float]) -> list[float]:
        """Elementwise maximum over ranks: what one rank knows (out of time, Ctrl-C), all do."""
        if self.count == 1:
            return values
        shared = torch.tensor(
            values,
            dtype=torch.float64 if self.device.type != "mps" else torch.float32,
            device=self.device,
        )
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return [float(value) for value in shared.tolist()]

    def share(self, value: Any) -> Any:
        """The first rank's value (anything JSON can say), on every rank."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(text)], device=self.device)
        torch.distributed.broadcast(size, src=0)
        data = (
            torch.tensor(list(text), dtype=torch.uint8, device=self.device)
            if self.first
            else size.new_empty(int(size), dtype=torch.uint8)
        )
        torch.distributed.broadcast(data, src=0)
        return json.loads(bytes(data.tolist()))
