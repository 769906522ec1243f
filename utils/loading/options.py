"""How a split is to be read, as one frozen value that is checked when it is made.

Purpose: `LoaderOptions` carries a ChunkLoader's choices to the store, the reader and the engine.
Used by: utils.loader, utils.loading.engines, utils.loading.sources
Design notes: the options of the sampler (batch size, shuffling, ranks) are the sampler's own. A
  value that is wrong is refused here, before any memory is taken or any process started.
Assistant guidance: when extending: an option that could change what is delivered does not belong
  here but in the sampler, whose state it is part of.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import get_args

from utils.loading.settings import Engine, Store
from warehouse.errors import ConfigError
from warehouse.read.chunks import Verify

__all__ = ["LoaderOptions"]


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """The choices of a ChunkLoader that affect its speed but not its batches.

    Parameters
    ----------
    engine
        "thread" decodes in this process, "spawn" in worker processes, "inline" when a batch is
        asked for.
    num_workers
        Decode threads or processes, 0 or more; 0 is "inline".
    prefetch_factor
        Batches in flight for each worker, at least 1.
    store
        Where bytes come from; "auto" lets `utils.loading.stores.choose_store` decide.
    prefetch
        Stored chunks that store="stream" fetches ahead, at least 1.
    verify
        When the crc32c of an inner chunk is checked.
    worker_timeout
        Seconds, at least 1, until a spawned worker that does not answer counts as hanging.

    Raises
    ------
    ConfigError
        If a value is not one of these.
    """

    engine: Engine = "thread"
    num_workers: int = 2
    prefetch_factor: int = 2
    store: Store = "auto"
    prefetch: int = 2
    verify: Verify = "first_touch"
    worker_timeout: int = 25

    def __post_init__(self) -> None:
        self._check_counts()

        if str(self.engine) == "fork":
            raise ConfigError(
                "engine='fork' is not supported",
                expected="thread, spawn or inline",
                remedy="a fork copies locks held by the threads of zarr and of this package, "
                "and deadlocks; use engine='spawn'",
            )

        for name, allowed in (("engine", Engine), ("store", Store), ("verify", Verify)):
            value, known = getattr(self, name), get_args(allowed)
            if value not in known:
                raise ConfigError(f"unknown {name}", expected=", ".join(known), found=repr(value))

    def _check_counts(self) -> None:
        minimum = {"num_workers": 0, "prefetch_factor": 1, "prefetch": 1, "worker_timeout": 1}
        for field in fields(self):
            if field.name not in minimum:
                continue
            value, least = getattr(self, field.name), minimum[field.name]
            # True is an int in Python, but nobody means one worker by it.
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"{field.name} must be a whole number of at least {least}", found=repr(value)
                )

    @property
    def spawns(self) -> bool:
        """Whether batches are decoded by other processes."""
        return self.engine == "spawn" and self.num_workers > 0

    @property
    def threads(self) -> int:
        """The number of decode threads in this process; 0 decodes when a batch is asked for."""
        return self.num_workers if self.engine == "thread" else 0
