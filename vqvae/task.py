"""The VQ-VAE as a Task of the training loop: loss, evaluation, checkpoint description.

What a model must know of its data is the feature table and the block's shape, both read from the
store. Flips, windows and the number of decoded levels follow from (seed, epoch, sample index) on
the batch's device, so that workers and engines do not influence them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.training.task import Task, seeded
from vqvae.block_sampling import cut, sample_depth
from vqvae.losses import TERMS, Weights, loss_terms
from vqvae.metrics import Tally
from vqvae.network.linear_start import linear_start
from vqvae.network.model import VQVAE, Shape
from vqvae.quantizers.codebook import CodebookRules
from vqvae.settings import VqvaeSettings
from vqvae.training_plots import draw_curve, draw_sheet
from warehouse.errors import TrainingError
from warehouse.layouts.features import Feature

__all__ = ["VqvaeTask", "codebook_rules", "loss_weights", "model_shape"]


def loss_weights(settings: VqvaeSettings) -> Weights:
    """Return the weights of the loss terms."""
    return Weights(
        cat=settings.cat_weight,
        canopy=settings.canopy_weight,
        beta=settings.beta,
        huber=settings.huber,
    )


def codebook_rules(settings: VqvaeSettings) -> CodebookRules:
    """Return how codebooks are averaged, and when codes are replaced."""
    return CodebookRules(
        settings.decay,
        settings.dead_share,
        settings.collapse_share,
        settings.collapse_steps,
        settings.start_step,
        settings.seed,
    )


def model_shape(settings: VqvaeSettings, chunk: Sequence[int]) -> Shape:
    """Return the model's shape over inner chunks (time, y, x).

    Raises
    ------
    TrainingError
        The window, the stride or the patch does not fit the inner chunk.
    """
    t, y, x = chunk
    window = settings.window or (t, y, x)
    if any(not 1 <= size <= most for size, most in zip(window, chunk, strict=True)):
        raise TrainingError(
            "the window is no part of an inner chunk",
            where="vqvae.window",
            expected=f"at most {list(chunk)}",
            found=list(window),
            remedy="give a smaller --vqvae.window or null",
        )
    shape = Shape(
        window,
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


class VqvaeTask(Task):
    """See `utils.training.task.Task`.

    Parameters
    ----------
    settings
        The section `vqvae`.
    features
        The cube's feature table.
    chunk
        Its inner chunk, (time, y, x) in voxels.
    blocks
        A batch of training blocks from whose principal components the model
        begins; None for random weights.
    """

    # At 3e-3 a run of eight levels diverged (docs/log.md).
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
        shape = model_shape(settings, chunk)
        # The same seed gives the same weights on every rank, whatever was drawn before.
        with seeded(settings.seed):
            self.vqvae = VQVAE(features, shape, codebook_rules(settings))
        self.model = self.vqvae
        if blocks is not None:
            linear_start(self.vqvae, *cut(blocks, settings.window))
        self.shown: tuple[Tensor, Tensor, Tensor] | None = None

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task`."""
        settings, index = self.settings, batch["index"]
        data, valid = cut(
            batch, settings.window, seed=settings.seed, epoch=epoch, flips=settings.flips
        )
        depth = sample_depth(
            index, settings.levels, settings.level_dropout, seed=settings.seed, epoch=epoch
        )
        # Repeats that fill a rank's last batch must count neither in the loss nor in the codebooks.
        if "pad" in batch:
            keep = ~batch["pad"]
        else:
            keep = torch.ones(len(index), dtype=torch.bool, device=data.device)

        found = model(data, valid, keep, depth)
        # bf16 has three digits: sums over millions of voxels would lose what a step changes.
        with torch.autocast(data.device.type, enabled=False):
            channels = self.vqvae.channels
            terms = loss_terms(found, channels.truth(data, valid), channels, self.weights)
            sums = {name: (terms[name] * keep).sum() for name in TERMS}
        return sums["total"], {name: value.detach() for name, value in sums.items()}

    def copied_modules(self) -> tuple[nn.Module, ...]:
        """Return the quantizer, whose codebooks are moving averages already."""
        # Codes get replaced, and the mean of a code before and after is no code.
        return (self.vqvae.quantizer,)

    def after_step(self, step: int, epoch: int) -> dict[str, float]:
        """Move the codebooks; return the figures that `Quantizer.step` names."""
        return self.vqvae.quantizer.step(step, epoch)

    def evaluate(self, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """See `Task`."""
        assert isinstance(model, VQVAE)
        channels, shape = model.channels, model.shape
        tally, self.shown = None, None
        with torch.inference_mode():
            for batch in batches:
                data, valid = cut(batch, self.settings.window)
                found = model(data, valid)
                physical = channels.physical(found.outputs)
                terms = loss_terms(found, channels.truth(data, valid), channels, self.weights)
                if tally is None:
                    # At the first batch, because only then is the device known.
                    tally = Tally(channels, shape.codebook_size, shape.levels, data.device)
                    self.shown = _most_varied(data, physical, valid)
                tally.add(data, valid, physical, found, terms)

        figures = tally.metrics() if tally else {}
        # Of the whole epoch's training tokens: held-out blocks are few places, and a code that they
        # do not need is not dead (docs/log.md).
        used = self.vqvae.quantizer.epoch_count[0] > 0
        return figures | {"train_usage": float(used.double().mean())}

    def describe(self) -> dict[str, Any]:
        """See `Task`."""
        return self.vqvae.describe()

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        """Draw curve.png, and sheet.png beside it.

        The sheet shows the most varied block of the first held-out batch.
        """
        title = f"{self.name}, {self.settings.quantizer}, K = {self.settings.codebook_size}"
        draw_curve(history, path, title=title)
        if self.shown is not None:
            truth, guess, valid = (value.cpu().numpy() for value in self.shown)
            sheet = path.with_name("sheet.png")
            draw_sheet(truth, guess, valid, self.vqvae.channels.features, sheet)


def _most_varied(data: Tensor, physical: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (truth, guess, valid) of the sample whose first feature varies most.

    A flat one would show nothing.
    """
    # A uniform block looks right under any model.
    first = data[..., 0].nan_to_num().masked_fill(~valid[..., 0], 0.0)
    sample = int(first.flatten(1).std(dim=1).argmax())
    return data[sample].clone(), physical[sample].clone(), valid[sample].clone()
