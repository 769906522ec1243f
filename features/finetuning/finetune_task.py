"""Fine-tuning as a task of the training loop: the last blocks of an encoder and a new head.

For `head_epochs` only the head learns, on features that do not change. Then the last `blocks`
blocks and what follows them in the network join in, each block at `block_decay` of the rate of the
next one. Everything else is frozen bit for bit. The epoch with the best accuracy on the selection
split (val, else train) is kept as a checkpoint that is itself an encoder; figures are of the
held-out split (test, else val).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from features.encoders.network import FINETUNED, NetworkEncoder
from features.finetuning.augmentation import augment_pictures
from features.finetuning.finetune_net import (
    FinetuneNet,
    recompute_blocks,
    trained_levels,
    trained_norms,
)
from features.finetuning.settings import FinetuneTraining
from features.metrics import classification_metrics, draw_confusion
from utils.training.checkpoint import (
    has_checkpoint,
    load_checkpoint,
    load_module,
    prefixed,
    save_checkpoint,
)
from utils.training.confusion import ConfusionMatrix
from utils.training.optimizer import ParameterGroup
from utils.training.ranks import to_device
from utils.training.task import Batch, BatchLoader, Task, seeded
from warehouse.errors import ConfigError

__all__ = ["FinetuneTask", "checkpoint_of"]

FIGURES = ("accuracy", "macro_f1", "auroc", "ece")


class FinetuneTask(Task):
    """An encoder and a head on images with classes; see `utils.training.task.Task`.

    Parameters
    ----------
    settings
        What decides the weights.
    encoder
        Becomes part of the model: its weights change in place.
    class_names
        In the order of the class indices.
    targets
        Class of every image of the training and of the selection split: int64 [n], -1 without one.
    steps
        Optimizer steps of an epoch.
    folder
        Where the best epoch and the confusion matrix are written.
    final
        Name, batches and targets of the split that reported figures are of; None reports those of
        the selection split.
    save_memory
        Recompute the activations of the trained blocks.

    Raises
    ------
    ConfigError
        The encoder has fewer blocks, has no recipe, or the settings contradict each other.
    """

    section, lr, headline = "finetune", 1e-3, ("accuracy", "max")
    model: FinetuneNet

    def __init__(
        self,
        settings: FinetuneTraining,
        encoder: NetworkEncoder,
        class_names: Iterable[str],
        targets: tuple[Tensor, Tensor],
        *,
        steps: int,
        folder: Path,
        final: tuple[str, BatchLoader, Tensor] | None = None,
        save_memory: bool = False,
    ) -> None:
        if not encoder.recipe:
            raise ConfigError(
                "this encoder cannot be fine-tuned: it has no recipe to be built from again",
                where=encoder.name,
            )
        self.settings = settings
        self.class_names = list(class_names)
        self.targets = targets
        self.final = final
        self.folder = folder
        self.name = f"fine-tuning {encoder.name}"
        # Before training: later its digest would be of other weights.
        self.started = encoder.describe()
        # The step at which the blocks join in, with a warm-up of their own.
        self.start = settings.head_epochs * steps
        with seeded(settings.seed):
            self.model = FinetuneNet(encoder, len(self.class_names))

        self.levels = trained_levels(encoder, settings.blocks)
        self.tuned = [parameter for level in self.levels for parameter in level]
        # With frozen statistics a step is the same however its batch is divided. But those of
        # random weights describe no images, so they have to follow the batches.
        norms = settings.norms or ("trained" if encoder.random else "frozen")
        if save_memory and norms == "trained":
            raise ConfigError(
                "recompute would count every batch twice in the statistics of trained norms",
                where="finetune.recompute",
                remedy="take --finetune.norms frozen",
            )
        if save_memory:
            recompute_blocks(encoder, settings.blocks)
        self.norms = trained_norms(encoder.network, self.tuned) if norms == "trained" else []

    def groups(self, weight_decay: float) -> list[ParameterGroup]:
        """Return the head at the whole rate from the first step, and the levels at their share.

        Level 0 is the last block and what follows it; levels begin at step `self.start`.
        """
        head = [*self.model.norm.parameters(), *self.model.head.parameters()]
        parts: list[tuple[list[nn.Parameter], float, int]] = [(head, 1.0, 0)]
        for level, parameters in enumerate(self.levels):
            rate = self.settings.backbone_rate * self.settings.block_decay**level
            parts.append((parameters, rate, self.start))

        groups = []
        for parameters, rate, start in parts:
            # Decay is for matrices and kernels; biases and norms are left alone.
            matrices = [one for one in parameters if one.ndim > 1]
            others = [one for one in parameters if one.ndim <= 1]
            groups.append(ParameterGroup(matrices, weight_decay, rate, start))
            groups.append(ParameterGroup(others, 0.0, rate, start))
        return [group for group in groups if group.parameters]

    def before_epoch(self, epoch: int) -> None:
        """Freeze the blocks while the head learns alone."""
        tuning = epoch >= self.settings.head_epochs
        for parameter in self.tuned:
            parameter.requires_grad_(tuning)
        self.model.moving = self.norms if tuning else []

    def loss(self, model: nn.Module, batch: Batch, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with label smoothing, summed over the images that have a class."""
        with torch.no_grad():
            resized = self.model.encoder.resized(batch["image"])
            pictures = augment_pictures(resized, batch["index"], epoch, self.settings)
        # A batch of one has no spread to take statistics from.
        for norm in self.model.moving:
            norm.training = len(pictures) > 1
        logits = model(pictures)
        target = self.targets[0].to(logits.device)[batch["index"]]
        if "pad" in batch:
            target = torch.where(batch["pad"], -1, target)
        with torch.autocast(logits.device.type, enabled=False):
            losses = functional.cross_entropy(
                logits.float(),
                target,
                # Images without a class are part of a batch, but not of the loss.
                ignore_index=-1,
                reduction="none",
                label_smoothing=self.settings.label_smoothing,
            )
        return losses.sum(), {"right": (logits.argmax(dim=1) == target).sum().detach()}

    def evaluate(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Metrics on the selection split; see `classification_metrics`."""
        return classification_metrics(*predictions(model, batches, self.targets[1]))

    def after_epoch(self, average: nn.Module, history: list[dict[str, Any]]) -> None:
        """Keep the best epoch; of equal ones the last, whose learning rate was lower.

        The choice is a function of the history, so that a resumed run keeps the same epoch.
        """
        scores = [line["accuracy"] for line in history if "accuracy" in line]
        if "accuracy" in history[-1] and scores[-1] >= max(scores[:-1], default=-1.0):
            tensors = prefixed("average", average.state_dict())
            save_checkpoint(self.folder, tensors, {"model": self.describe(), "best": history[-1]})

    def conclude(self, average: nn.Module) -> dict[str, float]:
        """Figures of the kept epoch on the held-out split; draws its confusion matrix.

        `average` is given the kept weights.
        """
        saved = load_checkpoint(self.folder)
        load_module(average, saved.part("average"), saved.path)
        best = saved.meta["best"]
        chosen = {"selection_accuracy": best["accuracy"], "best_epoch": best["epoch"]}
        if self.final is None:
            return {**chosen, **{key: best[key] for key in best if key in FIGURES}}

        name, batches, targets = self.final
        device = next(average.parameters()).device
        on_device = (to_device(batch, device) for batch in batches)
        probability, truth = predictions(average, on_device, targets)
        matrix = ConfusionMatrix.of(truth, probability.argmax(axis=1), len(self.class_names))
        self.draw_matrix(matrix.counts, name)
        return {**chosen, **classification_metrics(probability, truth)}

    def describe(self) -> dict[str, Any]:
        """JSON that `open_encoder` builds the fine-tuned encoder from."""
        # Fine-tuned again, or from random weights, it is still the same architecture.
        base = self.started["name"].removeprefix(f"{FINETUNED}-").removeprefix("random:")
        frozen = sum(1 for _ in self.model.network.parameters()) > len(self.tuned)
        return {
            "kind": FINETUNED,
            "name": f"{FINETUNED}-{Path(base).name}",
            "encoder": self.started,
            "frozen": frozen,
            "blocks": self.settings.blocks,
            "classes": self.class_names,
        }

    def draw_matrix(self, matrix: NDArray[np.int64], name: str) -> None:
        """Draw the confusion matrix, int64 [C, C], of the split `name`."""
        path = self.folder / "confusion.png"
        draw_confusion(matrix, self.class_names, path, f"{self.name} on {name}")

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        """Draw loss and accuracy by epoch as a PNG."""
        # Without pyplot, which would look for a display; imported here since it takes long.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        curves = {"loss": "loss, training", "accuracy": "accuracy, selection split"}
        for axes, (key, title) in zip(figure.subplots(1, 2), curves.items(), strict=True):
            scored = [line for line in history if key in line]
            epochs = [line["epoch"] for line in scored]
            axes.plot(epochs, [line[key] for line in scored], marker=".")
            axes.set(xlabel="epoch", title=title)
        figure.savefig(path, dpi=100)


def predictions(
    model: nn.Module, batches: Iterable[Batch], targets: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Predicted probabilities [n, C] and true classes [n] of the images that have a class."""
    probabilities, truth = [], []
    with torch.inference_mode():
        for batch in batches:
            target = targets[batch["index"].cpu()]
            kept = target >= 0
            if "pad" in batch:
                kept &= ~batch["pad"].cpu()
            probability = model(batch["image"]).double().softmax(dim=1)
            probabilities.append(probability.cpu()[kept])
            truth.append(target[kept])
    return torch.cat(probabilities).numpy(), torch.cat(truth).numpy()


def checkpoint_of(folder: Path) -> Path:
    """Where the fine-tuned encoder is.

    Before the end of the first epoch only the state of training exists, which can be opened too.
    """
    return folder if has_checkpoint(folder) else folder / "training"
