"""`ChunkLoader`: batches of a split as tensors, in the sampler's order, decoded by threads, spawned
workers or in line.

Purpose: the one way from a published split to a training step.
Used by: benchmarks.ours, benchmarks.scale, benchmarks.shuffle, detector.looking, detector.training,
  features.run_finetuning, segmentation.training, vqvae.block_sampling, vqvae.training
Design notes: work is issued in order and delivered in order, so the order never depends on who
  decoded what. The state counts delivered batches, whatever was fetched ahead. A batch lives in a
  ring slot that comes back when nothing refers to it.
Assistant guidance: when extending: engines live in utils.loading.engines and know nothing of
  epochs; nothing here may depend on the number of workers but speed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from utils.loading.device_copy import COPIES_PENDING, DeviceCopier, open_device
from utils.loading.engines import Batch, make_engine
from utils.loading.settings import Engine, Store
from utils.loading.stores import choose_store
from utils.log import get_log
from utils.samplers import BatchPlan, BatchSampler, ChunkBatchSampler
from warehouse.errors import ConfigError, StateError
from warehouse.read.version import Split

__all__ = ["ChunkLoader", "LoaderStats"]

log = get_log(__name__)


@dataclass(slots=True)
class LoaderStats:
    """Of the current epoch. decoded / samples is 1.0.

    Nothing is decoded twice, nothing for nothing.
    """

    samples: int = 0
    decoded: int = 0
    bytes_read: int = 0
    waited_s: float = 0.0
    chunks_opened: int = 0
    fallback_buffers: int = 0


class ChunkLoader:
    """Iterate a split as dicts of tensors: its arrays [B, ...] as stored (`image` uint8 [B, C, H,
    W]), and `index` int64 [B].

    With world_size > 1 and not drop_last, `pad` bool [B] is true in repeats that fill up a rank:
    leave them out of loss and metrics. device="cuda": batches come from page-locked memory, copied
    on a stream of their own one batch ahead, and are safe to use on the stream that is current when
    they are taken; so with any utils.loading.device_copy.Device. Another torch device: a blocking
    copy. augment: callable(batch, seed=, epoch=) -> batch, a pure function of its arguments, run in
    this process on `device`. Workers start at the first epoch and live until `close()`. A second
    `iter()` ends the first. Raises ConfigError on impossible options, CorruptError naming the file
    on damaged data, WorkerError naming a worker that died, raised, or did not answer for
    `worker_timeout` seconds.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int | None = None,
        *,
        arrays: Sequence[str] | None = None,
        sampler: BatchSampler | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        interleave: int = 1,
        chunks_per_batch: int = 1,
        engine: Engine = "thread",
        num_workers: int = 2,
        prefetch_factor: int = 2,
        store: Store = "auto",
        prefetch: int = 2,
        verify: Literal["first_touch", "always", "off"] = "first_touch",
        worker_timeout: int = 25,
        augment: Callable[..., dict[str, Any]] | None = None,
        device: Any = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if sampler is None:
            sampler = ChunkBatchSampler(
                split.chunk_sizes,
                64 if batch_size is None else batch_size,
                shuffle=shuffle,
                seed=seed,
                drop_last=drop_last,
                interleave=interleave,
                chunks_per_batch=chunks_per_batch,
                rank=rank,
                world_size=world_size,
            )
        elif batch_size is not None and batch_size != sampler.batch_size:
            raise ConfigError(
                "batch_size and the sampler disagree",
                expected=sampler.batch_size,
                found=batch_size,
                remedy="give one of them",
            )
        elif int(sampler.sizes.sum()) != len(split):
            raise ConfigError(
                "the sampler is of another split",
                where=repr(split),
                expected=f"{len(split)} samples",
                found=int(sampler.sizes.sum()),
            )
        names = list(split.arrays if arrays is None else arrays)
        unknown = [name for name in names if name not in split.arrays]
        if unknown:
            raise ConfigError(
                f"no array {unknown[0]!r}",
                where=repr(split),
                expected=f"some of {', '.join(split.arrays)}",
            )
        counts = {
            "prefetch_factor": prefetch_factor,
            "prefetch": prefetch,
            "worker_timeout": worker_timeout,
        }
        for name, value, least in (
            ("num_workers", num_workers, 0),
            *((name, value, 1) for name, value in counts.items()),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{name} must be a whole number of at least {least}", found=repr(value)
                )
        self.split, self.sampler, self.names = split, sampler, names
        self.augment = augment
        self.device, gpu = open_device(device)
        choice = choose_store(store, split, names, sampler)
        self.store, self.store_reason = choice.store, choice.why
        log.debug("store %s: %s", choice.store, choice.why)
        self.engine = make_engine(
            engine,
            split,
            names,
            sampler,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            store=self.store,
            prefetch=prefetch,
            verify=verify,
            worker_timeout=worker_timeout,
            spare=COPIES_PENDING if gpu else 0,
        )
        self.copier = DeviceCopier(gpu, self.engine.ring.memory) if gpu else None
        self.stats = LoaderStats()
        self._digest = 0
        self._running: Iterator[dict[str, Any]] | None = None
        self._pid = os.getpid()
        # Workers end before the interpreter tears its modules down, also when nobody calls close().
        self._closing = weakref.finalize(self, _close_all, self.copier, self.engine)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next; a state loaded for this very epoch is kept."""
        if epoch != self.sampler.epoch:
            self._digest = 0
        self.sampler.set_epoch(epoch)

    @property
    def order_digest(self) -> str:
        """64 hex digits.

        Sum modulo 2^256 over delivered batches of sha256(number, indices), little-endian int64.
        Adds up over ranks.
        """
        return f"{self._digest:064x}"

    def state_dict(self) -> dict[str, Any]:
        """Where delivery stands: valid for any engine, worker count, store and rank count.

        `order_digest` in it is this rank's share: to continue it exactly on several ranks, save the
        sum over ranks (modulo 2^256).
        """
        return self.sampler.state_dict() | {
            "version": self.split.warehouse.version,
            "split": self.split.name,
            "order_digest": self.order_digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises StateError naming what differs.

        Version, split, batch size, seed or sampler option.
        """
        for key, own in (("version", self.split.warehouse.version), ("split", self.split.name)):
            if state.get(key) != own:
                raise StateError(
                    f"this loader state belongs to another {key}",
                    expected=own,
                    found=state.get(key, "nothing"),
                )
        self._end_epoch()
        self.sampler.load_state_dict(state)
        # Shares of ranks add up, so that a state's share must be counted once.
        self._digest = int(str(state.get("order_digest", "0")), 16) if self.sampler.rank == 0 else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if os.getpid() != self._pid:
            raise ConfigError(
                "this loader was carried into a forked process",
                expected="a spawned process that makes its own",
                remedy="use multiprocessing start method 'spawn': a fork copies locks held by decode threads",
            )
        self._end_epoch()
        start = self.sampler.start
        if start == 0:
            self._digest = 0
        self._running = self._epoch(self.sampler.begin())
        return self._running

    def _epoch(self, start: int) -> Iterator[dict[str, Any]]:
        stats = self.stats = LoaderStats()
        filled = self.engine.run(self.sampler.batches(start))
        stream = (
            self.copier.run(filled, self._tensors)
            if self.copier
            else ((batch, None) for batch in filled)
        )
        try:
            for count in itertools.count(1):
                waited = time.perf_counter()
                item = next(stream, None)
                stats.waited_s += time.perf_counter() - waited
                if item is None:
                    return
                batch, arrays = item
                self._account(batch, stats)
                self.sampler.position = self.sampler.after(start, count)
                yield self._finish(self._tensors(batch) if arrays is None else arrays)
                del item, batch, arrays
        finally:
            stream.close()
            filled.close()

    def _account(self, batch: Batch, stats: LoaderStats) -> None:
        plan = batch.plan
        stats.samples += len(plan.indices)
        stats.decoded += batch.decoded
        stats.bytes_read += batch.bytes_read
        stats.chunks_opened += batch.chunks_opened
        stats.fallback_buffers += batch.fallback
        if not plan.pad:
            self._digest = (self._digest + batch_digest(plan)) % (1 << 256)

    def _tensors(self, batch: Batch) -> dict[str, Any]:
        """The batch's tensors on the host, taken out of it: who holds them holds the slot."""
        arrays: dict[str, Any] = {
            name: torch.from_numpy(array) for name, array in batch.arrays.items()
        }
        batch.arrays.clear()
        arrays["index"] = torch.from_numpy(batch.plan.indices.copy())
        if self.sampler.world_size > 1 and not self.sampler.drop_last:
            arrays["pad"] = torch.full((len(batch.plan.indices),), batch.plan.pad, dtype=torch.bool)
        return arrays

    def _finish(self, arrays: dict[str, Any]) -> dict[str, Any]:
        if self.device is not None:
            # Blocking: the slot may be filled again as soon as these host tensors are gone.
            arrays = {name: tensor.to(self.device) for name, tensor in arrays.items()}
        if self.augment is not None:
            arrays = self.augment(arrays, seed=self.sampler.seed, epoch=self.sampler.epoch)
        return arrays

    def _end_epoch(self) -> None:
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
            self._running = None

    def close(self) -> None:
        """End the epoch and the workers. The loader cannot be iterated again."""
        self._end_epoch()
        self._closing()

    def __enter__(self) -> ChunkLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(copier: DeviceCopier | None, engine: Any) -> None:
    if copier is not None:
        copier.close()
    engine.close()


def batch_digest(plan: BatchPlan) -> int:
    """sha256 of (batch number, sample indices) as little-endian int64, as an integer."""
    numbers = np.concatenate(([plan.number], plan.indices)).astype("<i8")
    return int.from_bytes(hashlib.sha256(numbers.tobytes()).digest(), "big")
