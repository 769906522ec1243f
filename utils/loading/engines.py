"""The choice of an engine: inline, decode threads, or spawned worker processes.

Purpose: `make_engine` opens what the read plan says, and returns an engine whose `run(plans)`
  yields filled batches in the order of the plans.
Used by: utils.loader
Design notes: all engines fill batches through a reader's `fill`, so that they cannot differ in what
  they deliver. Abandoned batches return their ring buffers before the next epoch begins.
Assistant guidance: when extending: an engine knows no epoch, no sampler and no tensor; a new one
  is a file beside local.py and spawn.py and must pass the same-order tests.
"""

from __future__ import annotations

from utils.loader_utils import BatchLayout
from utils.loading.batch_sampler import BatchSampler
from utils.loading.batches import Engine
from utils.loading.local import LocalEngine
from utils.loading.options import LoaderOptions
from utils.loading.sources import open_source
from utils.loading.spawn import SpawnEngine
from utils.loading.stores import ReadPlan
from warehouse.errors import ConfigError
from warehouse.read.version import Split

__all__ = ["make_engine"]


def make_engine(
    plan: ReadPlan,
    split: Split,
    names: list[str],
    sampler: BatchSampler,
    options: LoaderOptions,
    *,
    spare: int = 0,
) -> Engine:
    """Open a split by its read plan, and start the engine that the options name.

    Parameters
    ----------
    plan
        How the arrays are read; see `utils.loading.stores.choose_store`.
    split, names
        The split, and the arrays to read from it.
    sampler
        The sampler, which decides how large a batch can be.
    options
        The loader's options.
    spare
        Ring buffers beyond those of the batches in flight, for copies to a device.

    Raises
    ------
    ConfigError
        If there is no memory for the ring of batches.
    """
    rows = {name: (split.specs[name].shape[1:], split.specs[name].dtype) for name in names}
    layout = BatchLayout.of(sampler.largest_batch, rows)
    # The reader comes first: a store that cannot be opened then costs no memory for a ring.
    reader, source = open_source(plan, split, names, sampler, options)
    try:
        if options.spawns:
            return SpawnEngine(
                reader,
                source,
                layout,
                options.num_workers,
                options.prefetch_factor,
                options.worker_timeout,
                spare,
            )
        in_flight = max(1, options.threads * options.prefetch_factor)
        return LocalEngine(reader, names, layout, options.threads, in_flight, spare)
    except (OSError, MemoryError) as error:
        # Anonymous memory that does not fit raises OSError from mmap or ftruncate.
        size = f"{layout.size / 1e6:.0f} MB a batch"
        raise ConfigError(
            "no memory for the ring of batches",
            found=f"{size}: {error}",
            remedy="lower batch_size or prefetch_factor",
        ) from None
