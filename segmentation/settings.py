"""The `segment` section: patches, the U-Net and its training, prediction and stitching."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from utils.training.settings import TrainSettings
from warehouse.settings import BuildSettings

__all__ = ["SegmentSettings", "SegmentTraining"]


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
