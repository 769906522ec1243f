"""Which split a model is chosen by, and which its figures are of.

Purpose: `held_out_split` for trainers that score one split; `selection_and_final` for those that
  choose by one split and report on another.
Used by: detector.training, features.finetuning.run_finetuning, features.heads.cached,
  segmentation.training, vqvae.training
Design notes: in one place, so that all trainers mean the same by held out. A split without samples
  counts as absent. Scoring on train is better than refusing a small data set, but it is said.
Assistant guidance: when extending: no torch here.
"""

from __future__ import annotations

from collections.abc import Collection

from utils.log import get_log
from warehouse.read.version import Split, Warehouse

__all__ = ["held_out_split", "selection_and_final"]

log = get_log(__name__)


def held_out_split(warehouse: Warehouse, noun: str = "samples") -> Split:
    """The split that a trainer scores: `val`, else `test`, else `train`.

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
    """The split that chooses the best epoch, and the one that the reported figures are of.

    Returns
    -------
    tuple
        `val` or else `train`; `test` or else the first.
    """
    selection = "val" if "val" in names else "train"
    return selection, "test" if "test" in names else selection
