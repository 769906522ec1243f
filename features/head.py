"""Heads on cached features: linear, MLP, attention over the spatial map; trained from RAM in
seconds, one ablation after another.

Features are standardised by the training split's mean and deviation, which are part of the head.
The epoch with the best accuracy on the selection split (val, else train) is kept; figures are of
the held-out split (test, else val). A run is a function of the features and the settings. Memory:
the features of all splits as float32, and their maps as float16 for the attention head.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from features.metrics import classification_metrics, draw_confusion
from features.settings import HeadSettings
from utils.log import get_log
from utils.training.checkpoint import prefixed, save_checkpoint
from utils.training.confusion import ConfusionMatrix
from utils.training.held_out import selection_and_final
from warehouse.errors import ConfigError, StateError, TrainingError
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse

__all__ = ["Cached", "ablated", "make_head", "read_cached", "score", "train_head"]

log = get_log(__name__)

ONE_FOR_ALL = {"features", "checkpoint", "other_pictures", "output"}
"""Settings that an ablation cannot have otherwise than its neighbours."""


@dataclass(frozen=True)
class Cached:
    """A version's features in RAM. pooled: float32 [n, D]; spatial: float16 [n, D, h, w] or None;
    target: int64 [n], by split.

    source: digest of the pictures they are of.
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
        parts = (self.pooled, self.target, self.spatial)
        return (
            sum(value.numel() * value.element_size() for part in parts for value in part.values())
            / 1e6
        )

    @property
    def selection(self) -> str:
        return selection_and_final(self.pooled)[0]

    @property
    def held_out(self) -> str:
        return selection_and_final(self.pooled)[1]


def read_cached(warehouse: Warehouse, *, spatial: bool = False) -> Cached:
    """Raises StateError for a version that holds no features, or no maps where they are needed;
    TrainingError for classes that cannot be learnt: none at all, or one without samples in a
    split."""
    manifest = warehouse.manifest
    wanted = ["feature", "target"] + (["feature_map"] if spatial else [])
    for name in wanted:
        if name not in manifest.arrays:
            what, flag = (
                ("feature maps", " --features.feature_map true")
                if name == "feature_map"
                else ("features", "")
            )
            remedy = f"make them with python -m scripts.extract_features{flag}"
            raise StateError(
                f"this version holds no {what}", where=warehouse.location, remedy=remedy
            )
    found: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
    for split_name in warehouse.splits:
        split = warehouse.split(split_name)
        reader = split.reader(verify="always", keep=4)
        rows = read_samples(reader, wanted, np.arange(len(split)))
        labelled = rows["target"] >= 0
        if not labelled.any():
            continue
        if not labelled.all():
            log.warning(
                "%d of %d pictures of %s have no class and are left out",
                (~labelled).sum(),
                len(split),
                split_name,
            )
        for name in wanted:
            found[name][split_name] = torch.from_numpy(rows[name][labelled])
    classes = tuple(manifest.class_names)
    if len(classes) < 2 or "train" not in found["target"]:
        raise TrainingError(
            "these features have no classes to learn",
            where=warehouse.location,
            expected="two classes and a train split",
            found=f"{len(classes)} classes",
            remedy="build with --build.format classes, or from boxes",
        )
    for split_name, target in found["target"].items():
        counts = np.bincount(target.numpy(), minlength=len(classes))
        if not counts.all():
            name = classes[int(counts.argmin())]
            raise TrainingError(
                "a class has no samples in a split",
                where=f"{warehouse.location}, {split_name}",
                found=name,
                remedy="give the class more pictures, or leave it out with --build.classes",
            )
    pooled = {name: value.float() for name, value in found["feature"].items()}
    target = {name: value.long() for name, value in found["target"].items()}
    source = manifest.recipe["source"]["digest"]
    return Cached(
        warehouse.version,
        manifest.recipe["encoder"],
        classes,
        pooled,
        target,
        found.get("feature_map", {}),
        source,
    )


class Head(nn.Module):
    """Standardises, then classifies. pooled float32 [B, D] (attention.

    Spatial [B, D, h, w]) -> logits [B, C].
    """

    def __init__(self, kind: str, width: int, classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        if kind == "linear":
            self.body: nn.Module = nn.Linear(width, classes)
        else:
            self.body = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
            )
        self.attention = nn.Linear(width, 1) if kind == "attention" else None

    def fit_scale(self, rows: Tensor) -> None:
        """rows: [n, D], of the training split."""
        self.mean.copy_(rows.mean(dim=0))
        # A feature that never moves says nothing: it stays at 0.
        deviation = rows.std(dim=0)
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, torch.inf))

    def scaled(self, value: Tensor) -> Tensor:
        """Pooled rows [B, D], or maps [B, D, h, w] as cells [B, h * w, D]."""
        if value.ndim == 4:
            value = value.float().flatten(2).transpose(1, 2)
        return (value - self.mean) / self.deviation

    def forward(self, scaled: Tensor) -> Tensor:
        if self.attention is not None:
            scaled = (self.attention(scaled).softmax(dim=1) * scaled).sum(dim=1)
        return self.body(scaled)


def make_head(settings: HeadSettings, width: int, classes: int) -> Head:
    """Fresh weights from `settings.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Head(settings.kind, width, classes, settings.hidden, settings.dropout)


def ablated(settings: HeadSettings) -> list[HeadSettings]:
    """The runs that `ablations` asks for. Raises ConfigError for an override that is none."""
    runs = []
    for at, change in enumerate(settings.ablations or [{}]):
        base = settings.model_dump(exclude={"ablations"})
        unknown = sorted(set(change) - (set(base) - ONE_FOR_ALL))
        if unknown:
            raise ConfigError(
                "an ablation overrides what is no setting of head",
                where=f"head.ablations[{at}]",
                found=unknown[0],
                expected=f"some of {', '.join(key for key in base if key not in ONE_FOR_ALL)}",
            )
        try:
            runs.append(
                HeadSettings(
                    **{
                        **base,
                        "name": f"run{at}" if change else settings.name,
                        **change,
                        "ablations": [],
                    }
                )
            )
        except ValueError as error:
            found = " ".join(str(error).split()[:24])
            raise ConfigError(
                "an ablation does not fit", where=f"head.ablations[{at}]", found=found
            ) from None
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError("two ablations have one name", where="head.ablations", found=names)
    return runs


def train_head(
    settings: HeadSettings,
    cached: Cached,
    folder: Path,
    *,
    log_epoch: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train, keep the best epoch, write checkpoint.json, confusion.png into `folder`.

    Figures of the held-out split and `seconds`.
    """
    start = time.monotonic()
    inputs = cached.spatial if settings.kind == "attention" else cached.pooled
    if not inputs:
        raise StateError(
            "the attention head needs feature maps",
            where=cached.version,
            remedy="python -m scripts.extract_features --features.feature_map true",
        )
    classes = len(cached.class_names)
    head = make_head(settings, inputs["train"].shape[1], classes)
    head.fit_scale(
        cached.pooled["train"]
        if settings.kind != "attention"
        else inputs["train"].float().mean(dim=(2, 3))
    )
    best, best_epoch, weights = -1.0, 0, copy.deepcopy(head.state_dict())
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for epoch in range(1, settings.epochs + 1):
        loss = _one_epoch(
            head, optimizer, inputs["train"], cached.target["train"], settings, epoch, classes
        )
        schedule.step()
        figures = score(head, inputs[cached.selection], cached.target[cached.selection])[0]
        if log_epoch is not None:
            log_epoch(epoch, {"loss": loss, **figures})
        if figures["accuracy"] > best:
            best, best_epoch, weights = figures["accuracy"], epoch, copy.deepcopy(head.state_dict())
        elif settings.patience is not None and epoch - best_epoch >= settings.patience:
            break
    head.load_state_dict(weights)
    figures, matrix = score(head, inputs[cached.held_out], cached.target[cached.held_out])
    meta = {
        "model": {
            "kind": f"head-{settings.kind}",
            "width": inputs["train"].shape[1],
            "classes": list(cached.class_names),
            "hidden": settings.hidden,
        },
        "features": cached.version,
        "encoder": cached.encoder,
        "source": cached.source,
        "settings": settings.model_dump(mode="json", exclude={"ablations"}),
    }
    saved = {
        name: torch.where(value.isinf(), torch.finfo(value.dtype).max, value)
        for name, value in head.state_dict().items()
    }
    save_checkpoint(folder, prefixed("head", saved), meta)
    draw_confusion(
        matrix,
        cached.class_names,
        folder / "confusion.png",
        f"{settings.name} on {cached.held_out}",
    )
    return {
        "name": settings.name,
        **figures,
        "selection_accuracy": best,
        "best_epoch": best_epoch,
        "held_out": cached.held_out,
        "seconds": round(time.monotonic() - start, 3),
    }


def score(head: Head, inputs: Tensor, target: Tensor) -> tuple[dict[str, float], NDArray[np.int64]]:
    """Metrics and confusion matrix of a head on features."""
    head.eval()
    with torch.inference_mode():
        logits = torch.cat([head(head.scaled(part)) for part in inputs.split(1024)])
    probability = logits.double().softmax(dim=1).numpy()
    truth = target.numpy()
    matrix = ConfusionMatrix.of(truth, probability.argmax(axis=1), probability.shape[1])
    return classification_metrics(probability, truth), matrix.counts


def _one_epoch(
    head: Head,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    target: Tensor,
    settings: HeadSettings,
    epoch: int,
    classes: int,
) -> float:
    """Mean loss.

    Order, noise and mixing follow from (seed, epoch) alone; dropout from a generator seeded with
    both.
    """
    rng = np.random.default_rng([settings.seed, epoch])
    weights = torch.ones(classes)
    if settings.class_weights:
        counts = target.bincount(minlength=classes).float()
        weights = counts.sum() / (classes * counts)
    head.train()
    total, groups = 0.0, list(_steps(rng.permutation(len(target)), settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        for group in groups:
            count = sum(len(rows) for rows in group)
            optimizer.zero_grad()
            for rows in group:
                scaled, wanted = (
                    head.scaled(inputs[rows]),
                    functional.one_hot(target[rows], classes).float(),
                )
                if settings.noise:
                    scaled = scaled + settings.noise * torch.from_numpy(
                        rng.standard_normal(scaled.shape, dtype=np.float32)
                    )
                if settings.mixup:
                    share = float(rng.beta(settings.mixup, settings.mixup))
                    other = torch.from_numpy(rng.permutation(len(rows)))
                    scaled, wanted = (
                        share * scaled + (1 - share) * scaled[other],
                        share * wanted + (1 - share) * wanted[other],
                    )
                wanted = (
                    wanted * (1 - settings.label_smoothing) + settings.label_smoothing / classes
                )
                losses = -(wanted * weights * head(scaled).log_softmax(dim=1)).sum(dim=1)
                # A sum over the whole step's samples, so that accumulation gives what one big batch
                # gives.
                (losses.sum() / count).backward()
                total += float(losses.detach().sum())
            optimizer.step()
    return total / len(target)


def _steps(order: NDArray[np.int64], settings: HeadSettings) -> Iterator[list[Tensor]]:
    """The batches of each optimizer step."""
    size, each = settings.batch_size, settings.batch_size * settings.accumulate
    for first in range(0, len(order), each):
        part = torch.from_numpy(order[first : first + each])
        yield list(part.split(size))
