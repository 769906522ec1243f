"""Read the features of a published version into memory, by split, with the class of each sample.

Memory holds the features of all splits as float32, and for the attention head their maps as
float16. There is no way to train a head on features that do not fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.log import get_log
from utils.training.held_out import selection_and_final
from warehouse.errors import StateError, TrainingError
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse

__all__ = ["Cached", "head_inputs", "read_cached"]

log = get_log(__name__)


@dataclass(frozen=True)
class Cached:
    """A version's features in memory, by split.

    Attributes
    ----------
    version, encoder, class_names
        Of the version of features; `encoder` is the fingerprint in its recipe.
    pooled
        float32 [n, D].
    target
        int64 [n], an index into `class_names`.
    spatial
        float16 [n, D, h, w]; empty where no head needs maps.
    source
        Digest of the images that the features were made from.
    """

    version: str
    encoder: dict[str, Any]
    class_names: tuple[str, ...]
    pooled: dict[str, Tensor]
    target: dict[str, Tensor]
    spatial: dict[str, Tensor] = field(default_factory=dict)
    source: str | None = None

    @property
    def megabytes(self) -> float:
        """Size of all tensors, in 10^6 bytes."""
        total = 0
        for tensors in (self.pooled, self.target, self.spatial):
            total += sum(value.numel() * value.element_size() for value in tensors.values())
        return total / 1e6

    @property
    def selection(self) -> str:
        """The split that chooses the epoch: val, or train where there is no val."""
        return selection_and_final(self.pooled)[0]

    @property
    def held_out(self) -> str:
        """The split that reported figures are of: test, or the selection split without it."""
        return selection_and_final(self.pooled)[1]


def head_inputs(cached: Cached, kind: str) -> dict[str, Tensor]:
    """Return what a head of `kind` reads, by split: maps for attention, else pooled features.

    Raises
    ------
    StateError
        An attention head on features without maps.
    """
    inputs = cached.spatial if kind == "attention" else cached.pooled
    if not inputs:
        raise StateError(
            "the attention head needs feature maps",
            where=cached.version,
            remedy="python -m scripts.extract_features --features.feature_map true",
        )
    return inputs


def read_cached(warehouse: Warehouse, *, spatial: bool = False) -> Cached:
    """Read the labelled samples of all splits into memory.

    Parameters
    ----------
    spatial
        Read the feature maps too.

    Raises
    ------
    StateError
        The version holds no features, or no maps where they are needed.
    TrainingError
        There are no classes to learn, or a class has no samples in a split.
    """
    wanted = ["feature", "target"] + (["feature_map"] if spatial else [])
    _require_arrays(warehouse, wanted)

    found: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
    for split_name in warehouse.splits:
        rows = _labelled_rows(warehouse, split_name, wanted)
        if rows is not None:
            for name in wanted:
                found[name][split_name] = torch.from_numpy(rows[name])

    _require_classes(warehouse, found["target"])
    manifest = warehouse.manifest
    return Cached(
        warehouse.version,
        manifest.recipe["encoder"],
        tuple(manifest.class_names),
        # Stored as float16, which is too coarse for sums over features.
        {name: value.float() for name, value in found["feature"].items()},
        {name: value.long() for name, value in found["target"].items()},
        found.get("feature_map", {}),
        manifest.recipe["source"]["digest"],
    )


def _require_arrays(warehouse: Warehouse, wanted: list[str]) -> None:
    """Raise StateError for an array that the version does not have."""
    for name in wanted:
        if name in warehouse.manifest.arrays:
            continue
        what, flag = "features", ""
        if name == "feature_map":
            what, flag = "feature maps", " --features.feature_map true"
        raise StateError(
            f"this version holds no {what}",
            where=warehouse.location,
            remedy=f"make them with python -m scripts.extract_features{flag}",
        )


def _labelled_rows(
    warehouse: Warehouse, split_name: str, wanted: list[str]
) -> dict[str, NDArray[Any]] | None:
    """Return the samples of a split that have a class, or None where no sample has one."""
    split = warehouse.split(split_name)
    # Every chunk is checked: it is read once, and all heads depend on it.
    reader = split.reader(verify="always", keep=4)
    rows = read_samples(reader, wanted, np.arange(len(split)))
    labelled = rows["target"] >= 0
    if not labelled.any():
        return None
    if not labelled.all():
        log.warning(
            "%d of %d images of %s have no class and are left out",
            (~labelled).sum(),
            len(split),
            split_name,
        )
    return {name: value[labelled] for name, value in rows.items()}


def _require_classes(warehouse: Warehouse, targets: dict[str, Tensor]) -> None:
    """Raise TrainingError for features without classes, or a class without samples in a split."""
    classes = tuple(warehouse.manifest.class_names)
    if len(classes) < 2 or "train" not in targets:
        raise TrainingError(
            "these features have no classes to learn",
            where=warehouse.location,
            expected="two classes and a train split",
            found=f"{len(classes)} classes",
            remedy="build with --build.format classes, or from boxes",
        )
    for split_name, target in targets.items():
        counts = np.bincount(target.numpy(), minlength=len(classes))
        if not counts.all():
            raise TrainingError(
                "a class has no samples in a split",
                where=f"{warehouse.location}, {split_name}",
                found=classes[int(counts.argmin())],
                remedy="give the class more images, or leave it out with --build.classes",
            )
