"""Define the `segment` section: patches, the U-Net and its training, prediction and stitching.

`SegmentTraining` is what decides the weights, `SegmentSettings` adds the rest, so that a change of
the rest neither trains again nor refuses to resume.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from utils.training.settings import TrainSettings
from warehouse.section import NOT_CONTENT, RECORDED_APART, Marker
from warehouse.settings import BuildSettings

__all__ = ["SegmentSettings", "SegmentTraining"]


class SegmentTraining(TrainSettings):
    """What decides the weights: a resumed run must have the same values."""

    epochs: int | None = Field(
        40,
        ge=1,
        description=(
            "Number of epochs; null means that max_minutes alone sets the length of training"
            " and of its schedule."
        ),
    )
    batch_size: int = Field(
        4, ge=1, le=65_536, description="Patches per batch, in training and in prediction."
    )
    average: float = Field(
        0.99,
        ge=0,
        lt=1,
        description=(
            "Decay of the moving average of the weights, which is saved in their place; 0"
            " means no average."
        ),
    )
    cache_limit_mb: int = Field(
        256, ge=1, description="Largest size of the cache of held-out batches in megabytes."
    )
    width: int = Field(
        24,
        ge=4,
        le=512,
        description=(
            "Number of channels in the first level of the U-Net; each further level doubles it."
        ),
    )
    levels: int = Field(4, ge=1, le=6, description="Number of levels of the U-Net.")
    # Full resolution, a stem of 1, scored 0.796 on membranes in 7 minutes; a stem of 2 scored 0.805
    # in less than two. The finer network overfits a few images sooner (docs/log.md).
    stem: int = Field(
        2,
        ge=1,
        le=4,
        description="Side in pixels of the squares that the first layer folds into channels.",
    )
    dice_weight: float = Field(
        1.0, ge=0, description="Weight of the soft Dice loss, which is added to the cross-entropy."
    )
    turns: bool = Field(True, description="Augment with quarter turns and mirror images.")
    # Off by default: it holds off overfitting, but learns slower (docs/log.md).
    elastic: float = Field(
        0.0,
        ge=0,
        le=64,
        description="Standard deviation of the elastic deformation in pixels; 0 means none.",
    )
    contrast: float = Field(0.2, ge=0, lt=1, description="Largest relative change of contrast.")
    brightness: float = Field(0.2, ge=0, lt=1, description="Largest relative change of brightness.")


class SegmentSettings(SegmentTraining):
    """What `segment_patches` cuts, trains, predicts and stitches."""

    input_root: Annotated[str | None, RECORDED_APART] = Field(
        None,
        description=(
            "Folder of images and masks, paired by name; images without a mask are only "
            "predicted. Required."
        ),
    )
    mask_values: Annotated[dict[int, int], RECORDED_APART] = Field(
        {0: 0, 255: 1},
        description="Class for each pixel value of the mask files; other values are rejected.",
    )
    splits: dict[str, float] = Field(
        {"train": 0.7, "val": 0.1, "test": 0.2},
        description=(
            "Share of the images with masks in each split; splits given as folders are used as "
            "they are."
        ),
    )
    group_pattern: str | None = Field(
        None,
        description=(
            "Regular expression; files whose names give the same text for its first group "
            "stay in one split. null turns grouping off."
        ),
    )
    patch_size: int = Field(
        256,
        ge=16,
        le=8192,
        description="Side of a patch in pixels; a multiple of stem x 2^(levels - 1).",
    )
    overlap: int = Field(
        64,
        ge=0,
        description=(
            "Pixels that neighbouring patches share; the last patch of a row may share more."
        ),
    )
    channels: int | None = Field(
        None,
        description="Channels of the patches, 1 or 3; null means 1 if every image is grey, else 3.",
    )
    job_size: int = Field(
        16, ge=1, le=65_536, description="Patches per job; a job is one stored chunk."
    )
    jobs: Annotated[int | None, NOT_CONTENT] = Field(
        None, ge=1, description="Largest number of prediction jobs to run now; null means all."
    )
    max_pixels: int = Field(
        178_956_970,
        ge=1,
        description=(
            "Largest number of pixels in an image that may be decoded as a whole; TIFF files "
            "of any size are read in windows."
        ),
    )
    max_invalid: Annotated[int, NOT_CONTENT] = Field(
        0,
        ge=0,
        description=(
            "Largest number of images that may be unreadable, be too small or have invalid masks."
        ),
    )
    chunks_per_batch: Annotated[int, RECORDED_APART] = Field(
        8,
        ge=1,
        description=(
            "Number of stored chunks whose patches are shuffled together; each chunk has patches "
            "of only a few images."
        ),
    )
    checkpoint: Annotated[str | None, RECORDED_APART] = Field(
        None, description="Trained U-Net to predict with instead of training; null trains one."
    )
    blend: Annotated[Literal["ramp", "constant"], NOT_CONTENT] = Field(
        "ramp",
        description="Weights of overlapping patches: ramp (linear over the overlap) or constant.",
    )
    boundary_tolerance: Annotated[float, NOT_CONTENT] = Field(
        2.0,
        ge=0,
        le=64,
        description=(
            "Distance in pixels within which a boundary pixel counts as correct in the"
            " boundary F1 score."
        ),
    )
    output: Annotated[str | None, NOT_CONTENT] = Field(
        "artifacts/segment",
        description="Folder for patches, checkpoint, predictions and stitched masks.",
    )
    resume: Annotated[bool, NOT_CONTENT] = Field(
        True, description="Resume training from the checkpoint in output."
    )

    @field_validator("mask_values", "splits", "group_pattern")
    @classmethod
    def _as_of_a_build(cls, value: object, info: ValidationInfo) -> object:
        # Checked by the settings of a build, so that both refuse the same values.
        assert info.field_name is not None
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
        # The stem folds pixels, and every level but the first halves the grid.
        multiple = self.stem * 2 ** (self.levels - 1)
        if self.patch_size % multiple:
            raise ValueError(
                f"patch_size {self.patch_size} must be a multiple of {multiple} "
                "(stem x 2^(levels - 1))"
            )
        if self.classes < 2:
            raise ValueError(
                f"mask_values must declare at least two classes, not {self.mask_values}"
            )
        return self

    @property
    def folder(self) -> Path:
        """The folder below which everything is written."""
        return Path(self.output or "artifacts/segment")

    @property
    def classes(self) -> int:
        """Number of classes, up to the highest index that a value of the masks has."""
        return max(self.mask_values.values()) + 1

    def content(self, *, leave_out: Collection[Marker] = ()) -> dict[str, Any]:
        """Return the settings that decide the patches, as JSON values for their recipe.

        What decides the weights is left out: a version of predictions names their digest.
        """
        # The seed stays: it also decides which images are held out.
        weights = SegmentTraining.model_fields.keys() - {"seed"}
        content = super().content(leave_out=leave_out)
        return {key: value for key, value in content.items() if key not in weights}

    def training(self) -> SegmentTraining:
        """Return the part that decides the weights, with its checkpoint below `folder`."""
        kept = {key: getattr(self, key) for key in SegmentTraining.model_fields}
        return SegmentTraining(**kept | {"output": str(self.folder / "checkpoint")})

    def build(self) -> BuildSettings:
        """Return what listing, pairing and splitting need to know."""
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
