"""Our loader as rows of the benchmark: engines, stores and ways of checking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from benchmarks.data import Work

if TYPE_CHECKING:
    from utils.loading.settings import Engine, Store
    from warehouse.read.chunks import Verify

__all__ = ["LoaderChoice", "LoaderReader"]


class LoaderChoice(TypedDict, total=False):
    """What sets one of our rows apart from another; `fresh` is explained at `LoaderReader`."""

    engine: Engine
    store: Store
    verify: Verify
    arrays: tuple[str, ...] | None
    fresh: bool


class LoaderReader:
    """A `ChunkLoader` over one of the warehouses; batches are its `image` tensors.

    fresh: a new loader for each epoch, made in `renew` (outside the timing), so that every epoch
    checks every sample for the first time and fills buffers that were never touched.
    """

    def __init__(
        self,
        work: Work,
        workers: int,
        *,
        dataset: str = "lz4",
        **choice: Unpack[LoaderChoice],
    ) -> None:
        from utils.loader import ChunkLoader

        settings = work.settings

        def make() -> ChunkLoader:
            return ChunkLoader(
                work.split(dataset),
                settings.batch_size,
                arrays=choice.get("arrays", ("image",)),
                shuffle=settings.shuffle,
                num_workers=workers,
                engine=choice.get("engine", "thread"),
                store=choice.get("store", "auto"),
                verify=choice.get("verify", "first_touch"),
            )

        self.make = make
        self.fresh = choice.get("fresh", False)
        self.loader = make()

    def renew(self) -> None:
        if self.fresh:
            self.loader.close()
            self.loader = self.make()

    def epoch(self, number: int) -> Iterator[Any]:
        self.loader.set_epoch(number)
        for batch in self.loader:
            yield batch["image"]

    def facts(self) -> dict[str, Any]:
        """Of the last epoch.

        Decoded / samples (1.00 is the contract), fresh buffers, and the store that was chosen.
        """
        stats = self.loader.stats
        return {
            "decoded_per_sample": stats.decoded / max(1, stats.samples),
            "fallback_buffers": stats.fallback_buffers,
            "store": str(self.loader.store),
        }

    def close(self) -> None:
        self.loader.close()
