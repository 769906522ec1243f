"""Training heads on cached features, one ablation after another, in seconds.

The epoch with the best accuracy on the selection split is kept; figures are of the held-out split.
A run is a function of the features and the settings.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.heads.cached import Cached, head_inputs
from features.heads.head import Head, make_head
from features.metrics import classification_metrics, draw_confusion
from features.settings import HeadSettings
from utils.training.checkpoint import prefixed, save_checkpoint
from utils.training.confusion import ConfusionMatrix
from warehouse.errors import ConfigError

__all__ = ["ablated", "score", "train_head"]

LogEpoch = Callable[[int, dict[str, float]], None]
ONE_FOR_ALL = {"features", "checkpoint", "other_pictures", "output"}
"""Settings that must be the same for all ablations of a command."""


def ablated(settings: HeadSettings) -> list[HeadSettings]:
    """The settings of each run that `ablations` asks for.

    Raises ConfigError for an override of a setting that does not exist or must be the same for all
    runs, for a value that is not allowed, and for two runs of one name.
    """
    runs = [
        _overridden(settings, number, change)
        for number, change in enumerate(settings.ablations or [{}])
    ]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(
            "two ablations have the same name",
            where="head.ablations",
            found=names,
            remedy="give each ablation its own name",
        )
    return runs


def _overridden(settings: HeadSettings, number: int, change: dict[str, Any]) -> HeadSettings:
    base = settings.model_dump(exclude={"ablations"})
    allowed = [key for key in base if key not in ONE_FOR_ALL]
    unknown = sorted(set(change) - set(allowed))
    where = f"head.ablations[{number}]"
    if unknown:
        raise ConfigError(
            "an ablation overrides a setting that it cannot override",
            where=where,
            found=unknown[0],
            expected=f"some of {', '.join(allowed)}",
        )
    name = f"run{number}" if change else settings.name
    try:
        return HeadSettings(**{**base, "name": name, **change, "ablations": []})
    except ValueError as error:
        found = " ".join(str(error).split()[:24])
        raise ConfigError(
            "the value of an ablation is not allowed", where=where, found=found
        ) from None


def train_head(
    settings: HeadSettings, cached: Cached, folder: Path, *, log_epoch: LogEpoch | None = None
) -> dict[str, Any]:
    """Train a head, keep its best epoch, and write checkpoint.json and confusion.png to `folder`.

    Parameters
    ----------
    log_epoch
        Called with the epoch and its figures.

    Returns
    -------
    dict
        Metrics of the held-out split, `selection_accuracy`, `best_epoch` and `seconds`.

    Raises
    ------
    StateError
        An attention head on features without maps.
    """
    start = time.monotonic()
    inputs = head_inputs(cached, settings.kind)
    head = make_head(settings, inputs["train"].shape[1], len(cached.class_names))
    # A pooled vector need not be the mean of its map, so attention takes its scale from the maps.
    is_map = settings.kind == "attention"
    head.fit_scale(inputs["train"].float().mean(dim=(2, 3)) if is_map else cached.pooled["train"])

    best, best_epoch = _best_weights(settings, head, inputs, cached, log_epoch)
    figures, matrix = score(head, inputs[cached.held_out], cached.target[cached.held_out])
    _save_head(settings, head, cached, folder)
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


def _best_weights(
    settings: HeadSettings,
    head: Head,
    inputs: dict[str, Tensor],
    cached: Cached,
    log_epoch: LogEpoch | None,
) -> tuple[float, int]:
    """Train `head` and leave it with the weights of its best epoch; that accuracy and epoch."""
    selection = cached.selection
    # A copy: a state dict shares memory with the weights, which are trained further.
    best, best_epoch, weights = -1.0, 0, copy.deepcopy(head.state_dict())
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs)
    for epoch in range(1, settings.epochs + 1):
        loss = _one_epoch(
            head,
            optimizer,
            inputs["train"],
            cached.target["train"],
            settings,
            epoch,
            len(cached.class_names),
        )
        schedule.step()
        figures = score(head, inputs[selection], cached.target[selection])[0]
        if log_epoch is not None:
            log_epoch(epoch, {"loss": loss, **figures})
        # Of equal epochs the first one, from which `patience` counts.
        if figures["accuracy"] > best:
            best, best_epoch, weights = figures["accuracy"], epoch, copy.deepcopy(head.state_dict())
        elif settings.patience is not None and epoch - best_epoch >= settings.patience:
            break
    head.load_state_dict(weights)
    return best, best_epoch


def _save_head(settings: HeadSettings, head: Head, cached: Cached, folder: Path) -> None:
    meta = {
        "model": {
            "kind": f"head-{settings.kind}",
            "width": len(head.mean),
            "classes": list(cached.class_names),
            "hidden": settings.hidden,
        },
        "features": cached.version,
        "encoder": cached.encoder,
        "source": cached.source,
        "settings": settings.model_dump(mode="json", exclude={"ablations"}),
    }
    # Checkpoints refuse infinity, which is the deviation of a feature that never varies.
    tensors = {
        name: torch.where(value.isinf(), torch.finfo(value.dtype).max, value)
        for name, value in head.state_dict().items()
    }
    save_checkpoint(folder, prefixed("head", tensors), meta)


def score(head: Head, inputs: Tensor, target: Tensor) -> tuple[dict[str, float], NDArray[np.int64]]:
    """Metrics and confusion matrix int64 [C, C] of a head on features.

    inputs: [n, D] or [n, D, h, w]; target: int64 [n].
    """
    head.eval()
    with torch.inference_mode():
        # 1,024 at a time: cells of maps are float32 here and would be many times the features.
        logits = torch.cat([head(head.scaled(rows)) for rows in torch.split(inputs, 1024)])
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
    """Train for an epoch; the mean loss.

    Order, noise and mixing follow from (seed, epoch) alone, dropout from a generator that is seeded
    with both.
    """
    rng = np.random.default_rng([settings.seed, epoch])
    weights = torch.ones(classes)
    if settings.class_weights:
        # Inverse frequency: all samples of a rare class weigh as much as those of a common one.
        counts = target.bincount(minlength=classes).float()
        weights = counts.sum() / (classes * counts)

    head.train()
    total = 0.0
    steps = list(_steps(rng.permutation(len(target)), settings))
    with torch.random.fork_rng(devices=[]):
        # Dropout draws from the global generator, which is put back afterwards.
        torch.manual_seed(int(rng.integers(2**62)))
        for batches in steps:
            count = sum(len(rows) for rows in batches)
            optimizer.zero_grad()
            for rows in batches:
                one_hot = functional.one_hot(target[rows], classes).float()
                scaled, wanted = _mixed(head.scaled(inputs[rows]), one_hot, settings, rng)
                log_probability = head(scaled).log_softmax(dim=1)
                losses = -(wanted * weights * log_probability).sum(dim=1)
                # Divided by the samples of the whole step, so that accumulation gives what one big
                # batch gives.
                (losses.sum() / count).backward()
                total += float(losses.detach().sum())
            optimizer.step()
    return total / len(target)


def _mixed(
    scaled: Tensor, wanted: Tensor, settings: HeadSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A batch with noise, mixup (arXiv:1710.09412) and label smoothing, as the settings say.

    scaled: float32 [B, ...]; wanted: float32 [B, C], one-hot.
    """
    if settings.noise:
        noise = rng.standard_normal(scaled.shape, dtype=np.float32)
        scaled = scaled + settings.noise * torch.from_numpy(noise)
    if settings.mixup:
        # One share for the batch, as in the code of the paper.
        share = float(rng.beta(settings.mixup, settings.mixup))
        other = torch.from_numpy(rng.permutation(len(scaled)))
        scaled = share * scaled + (1 - share) * scaled[other]
        wanted = share * wanted + (1 - share) * wanted[other]
    smoothing = settings.label_smoothing
    return scaled, wanted * (1 - smoothing) + smoothing / wanted.shape[1]


def _steps(order: NDArray[np.int64], settings: HeadSettings) -> Iterator[list[Tensor]]:
    """The batches of each optimizer step, as int64 sample numbers."""
    samples_per_step = settings.batch_size * settings.accumulate
    for first in range(0, len(order), samples_per_step):
        rows = torch.from_numpy(order[first : first + samples_per_step])
        yield list(torch.split(rows, settings.batch_size))
