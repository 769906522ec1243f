"""The VQ-VAE as a Task of the training loop: settings, loss, evaluation, checkpoint description.

What a model must know of its data is the feature table and the block's shape, both read from the
store. Flips, windows and the number of decoded levels follow from (seed, epoch, sample index) on
the batch's device, so workers and engines have no part in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from utils.training.loop import TrainSettings, seeded
from vqvae.chunking import cut, sample_depth
from vqvae.losses import TERMS, Weights, loss_terms
from vqvae.metrics import Tally
from vqvae.model import VQVAE, Shape
from vqvae.quantizers.codebook import CodebookRules
from vqvae.sheet import draw_curve, draw_sheet
from warehouse.errors import TrainingError
from warehouse.layouts.cube_geometry import Feature

__all__ = ["VqvaeSettings", "VqvaeTask"]

Size = tuple[int, int, int]


class VqvaeSettings(TrainSettings):
    """What `train_vqvae` trains, on what, for how long. Triples are (time, y, x) in voxels."""

    warehouse: str | None = Field(
        None,
        description="a warehouse or one of its versions; null: the newest under build.output_root",
    )
    clip_norm: float = Field(1.0, gt=0)
    quantizer: Literal["ema", "fsq"] = "ema"
    codebook_size: int = Field(512, ge=4, le=65_536)
    code_dim: int = Field(
        64,
        ge=1,
        le=1024,
        description="numbers a latent vector; fsq takes its own from codebook_size",
    )
    levels: int = Field(8, ge=1, le=32, description="residual levels")
    level_dropout: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of samples decoded from an even draw of 1..levels levels",
    )
    beta: float = Field(0.8, ge=0, description="weight of the commitment to the codes")
    cat_weight: float = Field(0.1, ge=0)
    canopy_weight: float = Field(0.2, ge=0)
    huber: float | None = Field(
        None,
        gt=0,
        description="scaled error (channels.py) from where the squared error is linear; null: never",
    )
    stride: Size = Field((5, 4, 4), description="voxels a latent position")
    patch: Size = Field(
        (5, 4, 4), description="voxels the stem folds into channels; a divisor of stride"
    )
    width: int = Field(128, ge=8, le=4096, multiple_of=8)
    depth: int = Field(4, ge=0, le=64, description="residual blocks on each side")
    decay: float = Field(0.99, gt=0, lt=1, description="of the codebook's averages")
    dead_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="a code whose average count is under this share of the mean is replaced",
    )
    collapse_share: float = Field(
        0.1, ge=0, lt=1, description="perplexity under this share of what is possible is a collapse"
    )
    collapse_steps: int = Field(20, ge=1)
    start_step: int = Field(5, ge=0, description="steps before the k-means start of the codebooks")
    window: Size | None = Field(
        None, description="part of an inner chunk that is a sample; null: all of it"
    )
    min_valid_share: float = Field(
        0.1, ge=0, le=1, description="inner chunks with fewer valid voxels are left out"
    )
    sampling: Literal["chunk", "random"] = "chunk"
    flips: bool = True

    @property
    def weights(self) -> Weights:
        return Weights(
            cat=self.cat_weight, canopy=self.canopy_weight, beta=self.beta, huber=self.huber
        )

    @property
    def rules(self) -> CodebookRules:
        return CodebookRules(
            self.decay,
            self.dead_share,
            self.collapse_share,
            self.collapse_steps,
            self.start_step,
            self.seed,
        )

    def shape(self, chunk: Sequence[int]) -> Shape:
        """The model's shape over inner chunks (time, y, x).

        Raises TrainingError when window, strides or patch do not fit.
        """
        t, y, x = chunk
        if self.window is not None and any(
            not 1 <= part <= whole for part, whole in zip(self.window, chunk, strict=True)
        ):
            raise TrainingError(
                "the window is no part of an inner chunk",
                where="vqvae.window",
                expected=f"at most {list(chunk)}",
                found=list(self.window),
                remedy="give a smaller --vqvae.window or null",
            )
        shape = Shape(
            self.window or (t, y, x),
            self.stride,
            self.patch,
            self.width,
            self.depth,
            self.quantizer,
            self.codebook_size,
            self.code_dim,
            self.levels,
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
        self.settings, self.weights = settings, settings.weights
        with seeded(settings.seed):
            self.model = VQVAE(features, settings.shape(chunk), settings.rules)
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
