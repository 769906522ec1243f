"""The VQ-VAE as a Task of the training loop: settings, loss, evaluation, checkpoint description.

What a model must know of its data is the feature table and the block's shape, both read from the
store. Flips, windows and the number of decoded levels follow from (seed, epoch, sample index) on
the batch's device, so workers and engines have no part in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.training.loop import seeded
from vqvae.block_sampling import cut, sample_depth
from vqvae.losses import TERMS, Weights, loss_terms
from vqvae.metrics import Tally
from vqvae.model import VQVAE, Shape
from vqvae.quantizers.codebook import CodebookRules
from vqvae.settings import VqvaeSettings
from vqvae.training_plots import draw_curve, draw_sheet
from warehouse.errors import TrainingError
from warehouse.layouts.cube_geometry import Feature

__all__ = ["VqvaeTask", "codebook_rules", "loss_weights", "model_shape"]


def loss_weights(settings: VqvaeSettings) -> Weights:
    """The weights of the loss terms."""
    return Weights(
        cat=settings.cat_weight,
        canopy=settings.canopy_weight,
        beta=settings.beta,
        huber=settings.huber,
    )


def codebook_rules(settings: VqvaeSettings) -> CodebookRules:
    """How codebooks are averaged, and when codes are replaced."""
    return CodebookRules(
        settings.decay,
        settings.dead_share,
        settings.collapse_share,
        settings.collapse_steps,
        settings.start_step,
        settings.seed,
    )


def model_shape(settings: VqvaeSettings, chunk: Sequence[int]) -> Shape:
    """The model's shape over inner chunks (time, y, x).

    Raises
    ------
    TrainingError
        If the window, the stride or the patch does not fit the inner chunk.
    """
    t, y, x = chunk
    if settings.window is not None and any(
        not 1 <= part <= whole for part, whole in zip(settings.window, chunk, strict=True)
    ):
        raise TrainingError(
            "the window is no part of an inner chunk",
            where="vqvae.window",
            expected=f"at most {list(chunk)}",
            found=list(settings.window),
            remedy="give a smaller --vqvae.window or null",
        )
    shape = Shape(
        settings.window or (t, y, x),
        settings.stride,
        settings.patch,
        settings.width,
        settings.depth,
        settings.quantizer,
        settings.codebook_size,
        settings.code_dim,
        settings.levels,
    )
    shape.check()
    return shape


class VqvaeTask:
    """See utils.training.loop.Task. features: the cube's table; chunk: its inner chunk (time, y,
    x); blocks: a batch of training blocks from whose principal components the model begins; None:
    from random weights."""

    name, section, lr = "VQ-VAE", "vqvae", 2e-3
    headline = ("total", "min")

    def __init__(
        self,
        settings: VqvaeSettings,
        features: Sequence[Feature],
        chunk: Sequence[int],
        blocks: dict[str, Tensor] | None = None,
    ) -> None:
        self.settings, self.weights = settings, loss_weights(settings)
        with seeded(settings.seed):
            self.model = VQVAE(features, model_shape(settings, chunk), codebook_rules(settings))
        if blocks is not None:
            self.model.linear_start(*cut(blocks, settings.window))
        self.shown: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings, index = self.settings, batch["index"]
        data, valid = cut(
            batch, settings.window, seed=settings.seed, epoch=epoch, flips=settings.flips
        )
        depth = sample_depth(
            index, settings.levels, settings.level_dropout, seed=settings.seed, epoch=epoch
        )
        keep = (
            ~batch["pad"]
            if "pad" in batch
            else torch.ones(len(index), dtype=torch.bool, device=data.device)
        )
        found = model(data, valid, keep, depth)
        with torch.autocast(data.device.type, enabled=False):
            terms = loss_terms(
                found, self.model.channels.truth(data, valid), self.model.channels, self.weights
            )
            sums = {name: (terms[name] * keep).sum() for name in TERMS}
        return sums["total"], {name: value.detach() for name, value in sums.items()}

    def after_step(self, step: int, epoch: int) -> dict[str, float]:
        """Move the codebooks; figures of the step (quantizer.py names them)."""
        return self.model.quantizer.step(step, epoch)

    def evaluate(self, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        assert isinstance(model, VQVAE)
        channels, shape = model.channels, model.shape
        tally, self.shown = None, None
        with torch.inference_mode():
            for batch in batches:
                data, valid = cut(batch, self.settings.window)
                found = model(data, valid)
                physical = channels.physical(found.said)
                tally = tally or Tally(channels, shape.codebook_size, shape.levels, data.device)
                tally.add(
                    data,
                    valid,
                    physical,
                    found,
                    loss_terms(found, channels.truth(data, valid), channels, self.weights),
                )
                self.shown = self.shown or _most_varied(data, physical, valid)
        figures = tally.metrics() if tally else {}
        return figures | {
            "train_usage": float((self.model.quantizer.epoch_count[0] > 0).double().mean())
        }

    def describe(self) -> dict[str, Any]:
        return self.model.describe()

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        """curve.png, and sheet.png beside it: the most varied block of the first held-out batch."""
        draw_curve(
            history,
            path,
            title=f"{self.name}, {self.settings.quantizer}, K = {self.settings.codebook_size}",
        )
        if self.shown is not None:
            truth, guess, valid = (value.cpu().numpy() for value in self.shown)
            draw_sheet(
                truth, guess, valid, self.model.channels.features, path.with_name("sheet.png")
            )


def _most_varied(data: Tensor, physical: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(truth, guess, valid) of the batch's sample whose first feature varies most.

    A flat one would show nothing.
    """
    first = data[..., 0].nan_to_num().masked_fill(~valid[..., 0], 0.0)
    place = int(first.flatten(1).std(dim=1).argmax())
    return data[place].clone(), physical[place].clone(), valid[place].clone()
