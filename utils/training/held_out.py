"""Evaluation on held-out samples, and which split they come from.

Purpose: `Evaluator` scores a model; `held_out_split` for trainers that score one split;
  `selection_and_final` for those that choose by one split and report on another.
Used by: detector.training, features.finetuning.run_finetuning, features.heads.cached,
  segmentation.training, utils.training.loop, vqvae.training
Design notes: in one place, so that all trainers mean the same by held out. A split without
  samples counts as absent. Scoring on train is better than refusing a small data set, but there is
  a warning.
  Only the first rank evaluates; the others wait for its figures.
Assistant guidance: when extending: a pass over the held-out split must not depend on the epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator

from torch import nn

from utils.caching.cached_passes import CachedPasses
from utils.log import get_log
from utils.training.ranks import Ranks, to_device
from utils.training.settings import TrainSettings
from utils.training.task import Batch, BatchLoader, Task
from warehouse.read.version import Split, Warehouse

__all__ = ["Evaluator", "held_out_split", "selection_and_final"]

log = get_log(__name__)


def held_out_split(warehouse: Warehouse, noun: str = "samples") -> Split:
    """Return the split that a trainer scores: `val`, else `test`, else `train`.

    Parameters
    ----------
    noun
        What the warehouse holds, for the warning where there is no `val`.
    """
    splits = {name: warehouse.split(name) for name in warehouse.splits}
    filled = [name for name in ("val", "test") if name in splits and len(splits[name])]
    name = filled[0] if filled else "train"
    if name != "val":
        log.warning("the warehouse has no val %s: scoring on %s", noun, name)
    return splits[name]


def selection_and_final(names: Collection[str]) -> tuple[str, str]:
    """Return the split that chooses the best epoch, and the one that is reported on.

    Returns
    -------
    tuple
        `val` or else `train`; `test` or else the first.
    """
    # Never test: a figure of the split that chose the epoch is too good.
    selection = "val" if "val" in names else "train"
    return selection, "test" if "test" in names else selection


class Evaluator:
    """Scores a task's model on held-out batches.

    Parameters
    ----------
    loader
        The held-out batches; read by the first rank only, and kept in memory after the first pass
        where the settings allow it.
    """

    def __init__(
        self, task: Task, settings: TrainSettings, loader: BatchLoader, ranks: Ranks
    ) -> None:
        self.task, self.settings, self.ranks = task, settings, ranks
        self.loader = CachedPasses(
            loader,
            settings.cache_transformed_tensors,
            settings.cache_limit_mb << 20,
            f"{task.name}, held-out",
        )

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the metrics of a model in eval mode, on every rank."""
        metrics: dict[str, float] = {}
        if self.ranks.first:
            metrics = self.task.evaluate(model, self._batches())
        shared: dict[str, float] = self.ranks.share(metrics)
        return shared

    def _batches(self) -> Iterator[Batch]:
        # Always the same order, so that figures of two epochs can be compared to the last digit.
        self.loader.set_epoch(0)
        for batch in itertools.islice(self.loader, self.settings.limit_batches):
            yield to_device(batch, self.ranks.device)
