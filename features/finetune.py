"""Fine-tuning as a Task of the training loop: an encoder's last blocks and a new head, within a
budget of memory.

For `head_epochs` only the head learns, on features that stay as they are; then the last `blocks`
blocks and what follows them in the network join in, each block at `block_decay` of the rate of the
next. Everything else is frozen bit for bit: no gradients, and its batch norms and all dropout stay
in eval mode, so that a step is a function of (seed, epoch, samples). The epoch with the best
accuracy on the selection split (val, else train) is kept as a checkpoint that is itself an encoder;
figures are of the held-out split (test, else val).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recompute

from features.encoders import FINETUNED, NetworkEncoder
from features.metrics import classification_metrics, draw_confusion
from features.pictures import augment_pictures
from features.settings import FinetuneTraining
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
from utils.training.task import Task, seeded
from warehouse.errors import ConfigError

__all__ = [
    "FinetuneNet",
    "FinetuneTask",
    "checkpoint_of",
    "trained_levels",
]


class FinetuneNet(nn.Module):
    """Pictures -> encoder -> layer norm -> linear: logits float [B, C].

    `train()` moves nothing but the norms it is meant to.
    """

    def __init__(self, encoder: NetworkEncoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.network = encoder, encoder.network
        self.norm, self.head = nn.LayerNorm(encoder.width), nn.Linear(encoder.width, classes)
        self.moving: list[nn.Module] = []
        """Batch norms whose statistics follow the training batches."""

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: [B, 3, H, W], uint8 or float in [0, 1]."""
        logits: Tensor = self.head(self.norm(self.encoder(pictures).pooled))
        return logits

    def train(self, mode: bool = True) -> FinetuneNet:
        super().train(False)
        self.training = mode
        for norm in self.moving if mode else ():
            norm.training = True
        return self


class FinetuneTask(Task):
    """See utils.training.task.Task. targets: class of every picture, int64 [n], -1 without one, of
    the training and of the selection split; steps: of an epoch; final: (name, batches, targets)
    that the figures are of; None: the selection split's are the figures."""

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
        final: tuple[str, Any, Tensor] | None = None,
        save_memory: bool = False,
    ) -> None:
        """Raises ConfigError for more blocks than there are, an encoder that cannot be written
        down, and what cannot go together.
        """
        if not encoder.recipe:
            raise ConfigError(
                "this encoder cannot be fine-tuned: it has no recipe to be built from again",
                where=encoder.name,
            )
        self.settings, self.class_names, self.targets, self.final, self.folder = (
            settings,
            list(class_names),
            targets,
            final,
            folder,
        )
        self.started, self.start = encoder.describe(), settings.head_epochs * steps
        self.name = f"fine-tuning {encoder.name}"
        with seeded(settings.seed):
            self.model = FinetuneNet(encoder, len(self.class_names))
        self.levels = trained_levels(encoder, settings.blocks)
        self.tuned = [parameter for level in self.levels for parameter in level]
        norms = settings.norms or ("trained" if encoder.random else "frozen")
        if save_memory and norms == "trained":
            raise ConfigError(
                "recompute would count every batch twice in the statistics of trained norms",
                where="finetune.recompute",
                remedy="take --finetune.norms frozen",
            )
        if save_memory:
            for block in (
                encoder.blocks if settings.blocks is None else encoder.last_blocks(settings.blocks)
            ):
                block.forward = Recomputed(block)  # type: ignore[method-assign]
        known = {id(parameter) for parameter in self.tuned}
        self.norms = [
            module
            for module in encoder.network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and norms == "trained"
            and all(id(parameter) in known for parameter in module.parameters())
        ]

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
            matrices = [one for one in parameters if one.ndim > 1]
            others = [one for one in parameters if one.ndim <= 1]
            groups.append(ParameterGroup(matrices, weight_decay, rate, start))
            groups.append(ParameterGroup(others, 0.0, rate, start))
        return [group for group in groups if group.parameters]

    def before_epoch(self, epoch: int) -> None:
        tuning = epoch >= self.settings.head_epochs
        for parameter in self.tuned:
            parameter.requires_grad_(tuning)
        self.model.moving = self.norms if tuning else []

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            pictures = augment_pictures(
                self.model.encoder.resized(batch["image"]), batch["index"], epoch, self.settings
            )
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
                ignore_index=-1,
                reduction="none",
                label_smoothing=self.settings.label_smoothing,
            )
        return losses.sum(), {"right": (logits.argmax(dim=1) == target).sum().detach()}

    def evaluate(self, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        return classification_metrics(*judged(model, batches, self.targets[1]))

    def after_epoch(self, average: nn.Module, history: list[dict[str, Any]]) -> None:
        """Keep the best epoch, of equals the last, whose rate was lower.

        A function of the history: a resumed run keeps the same one.
        """
        scores = [line["accuracy"] for line in history if "accuracy" in line]
        if "accuracy" in history[-1] and scores[-1] >= max(scores[:-1], default=-1.0):
            save_checkpoint(
                self.folder,
                prefixed("average", average.state_dict()),
                {"model": self.describe(), "best": history[-1]},
            )

    def conclude(self, average: nn.Module) -> dict[str, float]:
        """Figures of the kept epoch on the held-out split, and its confusion matrix as a PNG.

        `average` becomes the kept weights.
        """
        best = load_checkpoint(self.folder)
        load_module(average, best.part("average"), best.path)
        said = {
            "selection_accuracy": best.meta["best"]["accuracy"],
            "best_epoch": best.meta["best"]["epoch"],
        }
        if self.final is None:
            return {
                **said,
                **{
                    key: value
                    for key, value in best.meta["best"].items()
                    if key in {"accuracy", "macro_f1", "auroc", "ece"}
                },
            }
        name, batches, targets = self.final
        device = next(average.parameters()).device
        probability, truth = judged(
            average, (to_device(batch, device) for batch in batches), targets
        )
        matrix = ConfusionMatrix.of(truth, probability.argmax(axis=1), len(self.class_names))
        self.draw_matrix(matrix.counts, name)
        return {**said, **classification_metrics(probability, truth)}

    def describe(self) -> dict[str, Any]:
        """JSON that `open_encoder` builds the fine-tuned encoder from.

        See NetworkEncoder.describe.
        """
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

    def draw_matrix(self, matrix: Any, name: str) -> None:
        draw_confusion(
            matrix, self.class_names, self.folder / "confusion.png", f"{self.name} on {name}"
        )

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            scored = [line for line in history if key in line]
            axes.plot(
                [line["epoch"] for line in scored], [line[key] for line in scored], marker="."
            )
            axes.set(
                xlabel="epoch", title=f"{key}, {'training' if key == 'loss' else 'selection split'}"
            )
        figure.savefig(path, dpi=100)


class Recomputed:
    """A block's forward pass that keeps its inputs only (activation checkpointing,
    arXiv:1604.06174). Nothing in it is random.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        plain = type(self.block).forward
        if not torch.is_grad_enabled():
            return plain(self.block, *inputs, **named)
        return recompute(
            plain, self.block, *inputs, use_reentrant=False, preserve_rng_state=False, **named
        )


def trained_levels(encoder: NetworkEncoder, count: int | None) -> list[list[nn.Parameter]]:
    """Parameters to train by their distance from the end: the last block with what follows it, the
    one before, ... With `count` None all blocks, and last what comes before them. What follows the
    last block is what the network has registered after it.

    Raises ConfigError for more blocks than the encoder has.
    """
    blocks = encoder.blocks if count is None else encoder.last_blocks(count)
    of = {
        id(parameter): at
        for at, block in enumerate(encoder.blocks)
        for parameter in block.parameters()
    }
    parameters = list(encoder.network.parameters())
    end = max((at for at, parameter in enumerate(parameters) if id(parameter) in of), default=-1)
    levels: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 1)]
    for at, parameter in enumerate(parameters):
        distance = (
            len(encoder.blocks) - 1 - of[id(parameter)]
            if id(parameter) in of
            else 0
            if at > end
            else len(blocks)
        )
        if distance < len(blocks) or (count is None and distance == len(blocks)):
            levels[distance].append(parameter)
    return levels


def judged(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], targets: Tensor
) -> tuple[Any, Any]:
    """(probability float64 [n, C], class int64 [n]) of the pictures that have one, as NumPy."""
    said, truth = [], []
    with torch.inference_mode():
        for batch in batches:
            target = targets[batch["index"].cpu()]
            kept = (target >= 0) & ~batch["pad"].cpu() if "pad" in batch else target >= 0
            said.append(model(batch["image"]).double().softmax(dim=1).cpu()[kept])
            truth.append(target[kept])
    return torch.cat(said).numpy(), torch.cat(truth).numpy()


def checkpoint_of(folder: Path) -> Path:
    """Where the encoder is.

    Before the first epoch's end only the state of training is there, and that can be opened too.
    """
    return folder if has_checkpoint(folder) else folder / "training"
