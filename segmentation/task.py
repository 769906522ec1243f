"""Segmentation as a Task of the training loop: settings, loss, augmentation, scores on held-out
patches.

The loss is cross-entropy plus soft Dice (Milletari et al. 2016, arXiv:1606.04797), a mean over each
patch's known pixels and summed over patches, so that it does not depend on how patches are dealt to
batches. Pixels of class 255 are left out of loss and scores. Augmentation is a function of (seed,
epoch, sample index): quarter turns, mirrors, an elastic warp, contrast and brightness.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from segmentation.mask_scores import dice_of, iou_of
from segmentation.unet import UNet
from utils.augment import uniform
from utils.training.loop import TrainSettings, seeded
from warehouse.format.schema import MASK_PADDING, BuildSettings

__all__ = [
    "SegmentSettings",
    "SegmentTask",
    "SegmentTraining",
    "augment_patches",
    "segmentation_loss",
]

TURN, MIRROR, CONTRAST, BRIGHTNESS, WARP = range(5)
KNOTS = 6
"""Control points of the elastic warp along each side."""


class SegmentTraining(TrainSettings):
    """What decides the weights: a resumed run must have these alike."""

    epochs: int | None = Field(40, ge=1)
    batch_size: int = Field(4, ge=1, le=65_536)
    average: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="decay of the running average of the weights, which is what is kept; 0: none",
    )
    cache_limit_mb: int = Field(
        256,
        ge=1,
        description="of held-out batches kept in memory: little, since pictures may be of any size",
    )
    width: int = Field(
        24, ge=4, le=512, description="channels of the U-Net's first level, doubled at each"
    )
    levels: int = Field(4, ge=1, le=6)
    stem: int = Field(
        2, ge=1, le=4, description="side of the square of pixels that is folded into channels first"
    )
    dice_weight: float = Field(1.0, ge=0, description="of the soft Dice term beside cross-entropy")
    turns: bool = Field(True, description="quarter turns and mirrors")
    elastic: float = Field(
        0.0,
        ge=0,
        le=64,
        description="standard deviation of the elastic warp's control points, in pixels",
    )
    contrast: float = Field(0.2, ge=0, lt=1)
    brightness: float = Field(0.2, ge=0, lt=1)


class SegmentSettings(SegmentTraining):
    """What `segment_patches` cuts, trains, predicts and stitches."""

    input_root: str | None = Field(
        None,
        description="pictures and masks, paired by name; pictures without a mask are predicted only",
    )
    mask_values: dict[int, int] = Field({0: 0, 255: 1}, description="value in a mask file -> class")
    splits: dict[str, float] = Field(
        {"train": 0.7, "val": 0.1, "test": 0.2},
        description="shares of pictures with masks, by parent",
    )
    group_pattern: str | None = None
    patch_size: int = Field(256, ge=16, le=8192)
    overlap: int = Field(64, ge=0, description="pixels neighbouring patches share")
    channels: int | None = Field(
        None, description="1 or 3 of the patches; null: 1 where every picture is grey, else 3"
    )
    job_size: int = Field(
        16, ge=1, le=65_536, description="patches of a job, which is one stored chunk"
    )
    jobs: int | None = Field(
        None, ge=1, description="do at most so many prediction jobs now; null: all"
    )
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        description="of a picture that has to be decoded whole; TIFF files are read by window",
    )
    max_invalid: int = Field(
        0, ge=0, description="pictures that may be unreadable, too small or have bad masks"
    )
    chunks_per_batch: int = Field(
        8,
        ge=1,
        description="stored chunks whose patches are mixed while training; they lie by parent",
    )
    checkpoint: str | None = Field(None, description="predict with this one instead of training")
    blend: Literal["ramp", "constant"] = Field(
        "ramp", description="how overlapping patches are weighed"
    )
    boundary_tolerance: float = Field(
        2.0,
        ge=0,
        le=64,
        description="pixels a boundary may be off and still count, for boundary F1",
    )
    output: str | None = Field(
        "artifacts/segment",
        description="patches, checkpoint, predictions, stitched pictures and masks",
    )
    resume: bool = Field(True, description="go on from the checkpoint in output")

    @field_validator("mask_values", "splits", "group_pattern")
    @classmethod
    def _as_of_a_build(cls, value: Any, info: Any) -> Any:
        return getattr(BuildSettings.model_validate({info.field_name: value}), info.field_name)

    @field_validator("channels")
    @classmethod
    def _grey_or_colour(cls, value: int | None) -> int | None:
        if value not in (None, 1, 3):
            raise ValueError(f"must be 1 or 3, not {value}")
        return value

    @model_validator(mode="after")
    def _patches_fit(self) -> SegmentSettings:
        if self.overlap >= self.patch_size:
            raise ValueError(
                f"overlap {self.overlap} must be smaller than patch_size {self.patch_size}"
            )
        multiple = self.stem * 2 ** (self.levels - 1)
        if self.patch_size % multiple:
            raise ValueError(
                f"patch_size {self.patch_size} must be a multiple of {multiple} (stem x 2^(levels - 1))"
            )
        if self.classes < 2:
            raise ValueError(
                f"mask_values must declare at least two classes, not {self.mask_values}"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output or "artifacts/segment")

    @property
    def classes(self) -> int:
        return max(self.mask_values.values()) + 1

    def training(self) -> SegmentTraining:
        """The part that decides the weights, writing its checkpoint below `folder`."""
        kept = {key: getattr(self, key) for key in SegmentTraining.model_fields}
        return SegmentTraining(**kept | {"output": str(self.folder / "checkpoint")})

    def build(self) -> BuildSettings:
        """What listing, pairing and splitting need to know."""
        known = {
            key: getattr(self, key)
            for key in (
                "input_root",
                "mask_values",
                "splits",
                "group_pattern",
                "seed",
                "max_pixels",
                "max_invalid",
            )
        }
        return BuildSettings(format="masks", output_root=str(self.folder), **known)


class SegmentTask:
    """A U-Net on patches; see utils.training.loop.Task."""

    name, section, lr, headline = "U-Net", "segment", 3e-3, ("dice", "max")

    def __init__(self, settings: SegmentTraining, *, channels: int, classes: int) -> None:
        self.settings = settings
        with seeded(settings.seed):
            self.model = UNet(
                channels=channels,
                classes=classes,
                width=settings.width,
                levels=settings.levels,
                stem=settings.stem,
            )

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        image, mask = augment_patches(
            batch["image"], batch["mask"], batch["index"], epoch, self.settings
        )
        logits = model(image)
        with torch.autocast(logits.device.type, enabled=False):
            cross, dice = segmentation_loss(logits.float(), mask)
        real = (~batch["pad"]).float() if "pad" in batch else torch.ones_like(cross)
        total = ((cross + self.settings.dice_weight * dice) * real).sum()
        return total, {
            "cross_entropy": (cross * real).sum().detach(),
            "soft_dice": (dice * real).sum().detach(),
        }

    def evaluate(self, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """Scores over the pixels of the held-out patches.

        Pixels of overlaps count as often as patches show them.
        """
        counts = torch.zeros(self.model.classes, self.model.classes, dtype=torch.int64)
        with torch.inference_mode():
            for batch in batches:
                said, truth = model(batch["image"]).argmax(dim=1), batch["mask"].long()
                real = truth != MASK_PADDING
                if "pad" in batch:
                    real &= ~batch["pad"].view(-1, 1, 1)
                pairs = truth[real] * self.model.classes + said[real]
                counts += torch.bincount(pairs, minlength=counts.numel()).view_as(counts).cpu()
        dice, iou = dice_of(counts.numpy()), iou_of(counts.numpy())
        return {
            "dice": float(np.mean(dice)),
            **{f"dice_{at}": value for at, value in enumerate(dice)},
            "iou": float(np.mean(iou)),
        }

    def describe(self) -> dict[str, Any]:
        return self.model.describe()

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        from segmentation.mask_sheet import draw_curve

        draw_curve(history, path, self.model.classes)


def segmentation_loss(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, soft Dice loss) of each patch, float [B]: means over its known pixels, and
    over the classes.

    logits: float [B, classes, H, W]; mask: uint8 [B, H, W], 255 unknown. A patch of unknown pixels
    only gives 0 and 0.
    """
    known = mask != MASK_PADDING
    target = torch.where(known, mask, 0).long()
    count = known.sum(dim=(1, 2)).clamp_min(1)
    cross = (functional.cross_entropy(logits, target, reduction="none") * known).sum(
        dim=(1, 2)
    ) / count
    said = logits.softmax(dim=1) * known.unsqueeze(1)
    truth = functional.one_hot(target, logits.shape[1]).permute(0, 3, 1, 2) * known.unsqueeze(1)
    shared = (said * truth).sum(dim=(2, 3))
    dice = 1 - ((2 * shared + 1) / (said.sum(dim=(2, 3)) + truth.sum(dim=(2, 3)) + 1)).mean(dim=1)
    return cross, dice


def augment_patches(
    image: Tensor, mask: Tensor, index: Tensor, epoch: int, settings: SegmentTraining
) -> tuple[Tensor, Tensor]:
    """float32 [B, C, H, W] in [0, 255] and its mask uint8 [B, H, W], moved alike.

    What is given is not written to.
    """
    numbers = index.cpu().numpy()

    def draw(purpose: int) -> Tensor:
        return (
            torch.from_numpy(uniform(settings.seed, epoch, numbers, purpose))
            .float()
            .to(image.device)
        )

    picture = image.float()
    if settings.turns:
        turns, mirrors = (draw(TURN) * 4).long().tolist(), (draw(MIRROR) < 0.5).tolist()
        square = picture.shape[-1] == picture.shape[-2]
        picture = torch.stack(
            [
                _turned(one, turn if square else turn & 2, mirror)
                for one, turn, mirror in zip(picture, turns, mirrors, strict=True)
            ]
        )
        mask = torch.stack(
            [
                _turned(one, turn if square else turn & 2, mirror)
                for one, turn, mirror in zip(mask, turns, mirrors, strict=True)
            ]
        )
    if settings.elastic:
        knots = torch.stack([draw(WARP + at) for at in range(4 * KNOTS * KNOTS)], dim=1)
        # Two uniform numbers as one that is nearly normal, of variance 1.
        moved = (knots[:, ::2] + knots[:, 1::2] - 1).view(-1, 2, KNOTS, KNOTS) * 6**0.5
        picture, mask = _warped(picture, mask, moved * settings.elastic)
    if settings.contrast or settings.brightness:
        contrast = 1 + settings.contrast * (2 * draw(CONTRAST) - 1)
        brightness = 128 * settings.brightness * (2 * draw(BRIGHTNESS) - 1)
        picture = (
            (picture - 128) * contrast.view(-1, 1, 1, 1) + 128 + brightness.view(-1, 1, 1, 1)
        ).clamp(0, 255)
    return picture, mask


def _turned(one: Tensor, turn: int, mirror: bool) -> Tensor:
    one = torch.rot90(one, turn, (-2, -1))
    return one.flip(-1) if mirror else one


def _warped(picture: Tensor, mask: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """knots: displacement of control points in pixels, x then y, [B, 2, k, k].

    Between them it is bicubic.
    """
    height, width = picture.shape[2:]
    scale = knots.new_tensor([2 / width, 2 / height]).view(1, 2, 1, 1)
    shift = functional.interpolate(
        knots * scale, size=(height, width), mode="bicubic", align_corners=True
    ).permute(0, 2, 3, 1)
    x, y = (
        (torch.arange(side, device=picture.device) + 0.5) * 2 / side - 1 for side in (width, height)
    )
    grid = (
        torch.stack([x.expand(height, width), y.view(-1, 1).expand(height, width)], dim=-1) + shift
    )
    moved = functional.grid_sample(picture, grid, padding_mode="reflection", align_corners=False)
    labels = functional.grid_sample(
        mask.unsqueeze(1).float(),
        grid,
        mode="nearest",
        padding_mode="reflection",
        align_corners=False,
    )
    return moved, labels.squeeze(1).to(torch.uint8)
