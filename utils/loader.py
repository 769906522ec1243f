"""Batches of a split as tensors: `ChunkLoader`.

Purpose: the one way from a published split to a training step.
Used by: benchmarks.ours, benchmarks.scale, benchmarks.shuffle, detector.inference.image_batches,
  detector.training, features.finetuning.run_finetuning, segmentation.training,
  vqvae.block_sampling, vqvae.training
Design notes: batches are issued in order and delivered in order, so that the order never depends on
  who decoded what. The state counts delivered batches, whatever was fetched ahead. A batch lives in
  a ring buffer that comes back when nothing refers to it.
Assistant guidance: when extending: engines live in utils.loading and know nothing of epochs; the
  number of workers may change the speed and nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from utils.loading.batches import Batch, LoaderStats
from utils.loading.batches import Engine as BatchEngine
from utils.loading.device_copy import COPIES_PENDING, DeviceCopier, open_device
from utils.loading.engines import make_engine
from utils.loading.options import LoaderOptions
from utils.loading.settings import Engine, Store
from utils.loading.stores import choose_store
from utils.log import get_log
from utils.samplers import BatchPlan, BatchSampler, ChunkBatchSampler
from warehouse.errors import ConfigError, StateError
from warehouse.read.chunks import Verify
from warehouse.read.version import Split

__all__ = ["ChunkLoader", "LoaderStats"]

log = get_log(__name__)


class ChunkLoader:
    """Iterate a split as dictionaries of tensors, one for each batch.

    A batch holds the split's arrays as stored, ``[B, ...]`` each (`image` uint8 ``[B, C, H, W]``),
    and `index`, the sample numbers, int64 ``[B]``. With several ranks, unless `drop_last`, it also
    holds `pad`, bool ``[B]``: true in repeats that fill up a rank. Leave these out of the loss and
    the metrics.

    Workers start at the first epoch and live until `close`. A second `iter()` ends the first.

    Parameters
    ----------
    split
        The split to read, from `Warehouse.split`.
    batch_size
        Samples in a batch; 64 when None, or what `sampler` says.
    arrays
        The arrays to read; all of the split when None.
    sampler
        The order of the samples. When None, a `ChunkBatchSampler` is made from the options below.
    shuffle, seed, drop_last, interleave, chunks_per_batch, rank, world_size
        The options of `ChunkBatchSampler`; they have no effect when `sampler` is given.
    engine, num_workers, prefetch_factor, store, prefetch, verify, worker_timeout
        How batches are read, which does not change them; see
        `utils.loading.options.LoaderOptions`.
    augment
        A function ``augment(batch, *, seed, epoch) -> batch`` that depends on nothing but its
        arguments. It runs in this process, on `device`.
    device
        Where batches go. "cuda" copies them from page-locked memory, on a stream of their own, one
        batch ahead; they are safe to use on the stream that is current when they are taken. Any
        `utils.loading.device_copy.Device` works in the same way. Another torch device gets a
        blocking copy.

    Raises
    ------
    ConfigError
        If the options contradict each other or the split.
    CorruptError
        While iterating, if a file is damaged; the message names it.
    WorkerError
        While iterating, if a worker died, raised an error, or did not answer for `worker_timeout`
        seconds; the message names it.

    Examples
    --------
    >>> train = Warehouse.open("artifacts/tensor_warehouse").split("train")  # doctest: +SKIP
    >>> with ChunkLoader(train, 32, seed=1) as loader:  # doctest: +SKIP
    ...     for epoch in range(10):
    ...         loader.set_epoch(epoch)
    ...         for batch in loader:
    ...             step(batch["image"], batch["box"], batch["box_mask"])
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
        verify: Verify = "first_touch",
        worker_timeout: int = 25,
        augment: Callable[..., dict[str, Any]] | None = None,
        device: Any = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        options = LoaderOptions(
            engine=engine,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor,
            store=store,
            prefetch=prefetch,
            verify=verify,
            worker_timeout=worker_timeout,
        )
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
        else:
            _check_sampler(sampler, split, batch_size)
        names = _chosen_arrays(split, arrays)

        self.split, self.sampler, self.names = split, sampler, names
        self.augment = augment
        self._open(options, device)
        self.stats = LoaderStats()
        self._digest = 0
        self._running: Iterator[dict[str, Any]] | None = None
        self._pid = os.getpid()
        # Workers end before the interpreter tears its modules down, also when nobody calls close().
        self._closing = weakref.finalize(self, _close_all, self.copier, self.engine)

    def _open(self, options: LoaderOptions, device: Any) -> None:
        """Decide how the split is read, and open what reads it and what copies it to a device."""
        self.device, gpu = open_device(device)

        plan = choose_store(options.store, self.split, self.names, self.sampler)
        self.store, self.store_reason = plan.store, plan.reason
        log.debug("store %s: %s", plan.store, plan.reason)

        spare = COPIES_PENDING if gpu else 0
        self.engine = make_engine(plan, self.split, self.names, self.sampler, options, spare=spare)
        self.copier = DeviceCopier(gpu, self.engine.ring.memory) if gpu else None

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch to iterate next; a position loaded for this very epoch is kept."""
        if epoch != self.sampler.epoch:
            self._digest = 0
        self.sampler.set_epoch(epoch)

    @property
    def order_digest(self) -> str:
        """The order delivered so far, as 64 hexadecimal digits.

        It is the sum, modulo 2^256, of sha256(batch number, sample indices) over the delivered
        batches, the numbers as little-endian int64. The digests of ranks add up to that of all.
        """
        return f"{self._digest:064x}"

    def state_dict(self) -> dict[str, Any]:
        """Return where delivery stands, for any engine, worker count, store and rank count.

        Its `order_digest` is this rank's share. To continue the digest exactly on several ranks,
        save the sum over the ranks (modulo 2^256).
        """
        return self.sampler.state_dict() | {
            "version": self.split.warehouse.version,
            "split": self.split.name,
            "order_digest": self.order_digest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where a saved state stood.

        Raises
        ------
        StateError
            If the state belongs to another version or split, or to other options of the sampler;
            the message names the first that differs.
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
                remedy="use the multiprocessing start method 'spawn': "
                "a fork copies locks held by decode threads",
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
        stats.add(batch)
        if not plan.pad:
            self._digest = (self._digest + batch_digest(plan)) % (1 << 256)

    def _tensors(self, batch: Batch) -> dict[str, Any]:
        """Take the tensors out of a batch; whoever holds them holds its ring buffer."""
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
            # Blocking: the ring buffer may be filled again as soon as these host tensors are gone.
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


def _check_sampler(sampler: BatchSampler, split: Split, batch_size: int | None) -> None:
    if batch_size is not None and batch_size != sampler.batch_size:
        raise ConfigError(
            "batch_size and the sampler disagree",
            expected=sampler.batch_size,
            found=batch_size,
            remedy="give one of them",
        )
    if int(sampler.sizes.sum()) != len(split):
        raise ConfigError(
            "the sampler is of another split",
            where=repr(split),
            expected=f"{len(split)} samples",
            found=int(sampler.sizes.sum()),
        )


def _chosen_arrays(split: Split, arrays: Sequence[str] | None) -> list[str]:
    names = list(split.arrays if arrays is None else arrays)
    unknown = [name for name in names if name not in split.arrays]
    if unknown:
        raise ConfigError(
            f"no array {unknown[0]!r}",
            where=repr(split),
            expected=f"some of {', '.join(split.arrays)}",
        )
    return names


def _close_all(copier: DeviceCopier | None, engine: BatchEngine) -> None:
    if copier is not None:
        copier.close()
    engine.close()


def batch_digest(plan: BatchPlan) -> int:
    """sha256 of (batch number, sample indices) as little-endian int64, as an integer."""
    numbers = np.concatenate(([plan.number], plan.indices)).astype("<i8")
    return int.from_bytes(hashlib.sha256(numbers.tobytes()).digest(), "big")
