"""The settings that all trainers share.

Purpose: `TrainSettings`, the keys of the training loop; `AugmentSettings`, the keys of image
  augmentation. Trainers derive their own sections from them.
Used by: detector.settings, detector.task, features.finetuning.settings, segmentation.settings,
  utils.augment, utils.training.held_out, utils.training.loop, utils.training.run.recording,
  utils.training.run.schedule, utils.training.run.step, vqvae.settings
Design notes: this module imports no torch, so that a command can print its `--help` quickly.
Assistant guidance: when extending: a setting that does not change the losses belongs in
  MAY_CHANGE, so that a resumed run may have another value.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from warehouse.section import Section

__all__ = ["MAY_CHANGE", "AugmentSettings", "TrainSettings"]


MAY_CHANGE = {
    "epochs",
    "max_minutes",
    "device",
    "log_interval",
    "evaluate_every",
    "status_file",
    "output",
    "resume",
    # A version that was copied or moved is the same data; the loader's state names the version.
    "warehouse",
    # Only the held-out batches are cached, and a kept batch is the same batch.
    "cache_transformed_tensors",
    "cache_limit_mb",
}
"""Settings that a resumed run may have otherwise; all others decide its losses."""


class TrainSettings(Section):
    """What every trainer's section has.

    With `epochs: null`, `max_minutes` is required and alone ends training.
    """

    epochs: int | None = Field(
        20,
        ge=1,
        description=(
            "Number of epochs; null means that max_minutes alone sets the length of training"
            " and of its schedule."
        ),
    )
    max_minutes: float | None = Field(
        None, gt=0, description="Minutes after which training stops; null means no limit."
    )
    batch_size: int = Field(16, ge=1, le=65_536, description="Samples per batch and process.")
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate; null means the default of the model."
    )
    warmup_steps: int = Field(
        50, ge=0, description="Number of steps over which the learning rate rises to its peak."
    )
    weight_decay: float = Field(0.05, ge=0, description="Weight decay of AdamW.")
    clip_norm: float = Field(
        10.0,
        gt=0,
        description="Largest norm of the gradients; larger gradients are scaled down to it.",
    )
    average: float = Field(
        0.998,
        ge=0,
        lt=1,
        description=(
            "Decay of the moving average of the weights, which is saved in their place; 0"
            " means no average."
        ),
    )
    accumulate: int = Field(1, ge=1, description="Number of batches per optimizer step.")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed for the weights, the sample order and the augmentation.",
    )
    device: str = Field(
        "auto",
        description=(
            "Device to compute on: auto (a GPU if there is one), cpu, cuda, cuda:1, and so on."
        ),
    )
    precision: Literal["auto", "float32", "bf16", "fp16"] = Field(
        "auto",
        description=(
            "Precision of the forward pass; auto means bf16 on a GPU that supports it, else "
            "float32."
        ),
    )
    log_interval: int = Field(10, ge=1, description="Number of steps between log lines.")
    evaluate_every: int = Field(
        1, ge=1, description="Number of epochs between evaluations on the held-out split."
    )
    status_file: str | None = Field(
        None,
        description=(
            "JSON file that is updated with the current state of training; null means none."
        ),
    )
    limit_batches: int | None = Field(
        None,
        ge=1,
        description="Largest number of batches per epoch, for a quick trial; null means all.",
    )
    cache_transformed_tensors: bool | None = Field(
        None,
        description=(
            "Keep held-out batches in memory after the first pass; null keeps them only if"
            " all of them fit."
        ),
    )
    cache_limit_mb: int = Field(
        1024, ge=1, description="Largest size of the cache of held-out batches in megabytes."
    )
    output: str | None = Field(
        None,
        description=(
            "Folder for the checkpoint and the logs; null means checkpoints/<name of the model>."
        ),
    )
    resume: bool = Field(False, description="Resume from the checkpoint in output.")

    @model_validator(mode="after")
    def _something_ends_it(self) -> TrainSettings:
        if self.epochs is None and self.max_minutes is None:
            raise ValueError("with epochs null, max_minutes must say when to stop")
        return self


class AugmentSettings(Section):
    """How images are augmented.

    Flips are probabilities; all others are the largest relative change, and 0 means none. `zoom`
    also moves an image by as much as is left over; `aspect` stretches one axis against the other.
    """

    flip_x: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    flip_y: float = Field(0.0, ge=0, le=1, description="Probability of a vertical flip.")
    zoom: float = Field(
        0.35,
        ge=0,
        lt=1,
        description="Largest relative change of scale: 0.35 scales by 1/1.35 to 1.35.",
    )
    aspect: float = Field(
        0.1, ge=0, lt=1, description="Largest relative change of the aspect ratio."
    )
    brightness: float = Field(0.2, ge=0, lt=1, description="Largest relative change of brightness.")
    contrast: float = Field(0.2, ge=0, lt=1, description="Largest relative change of contrast.")
    saturation: float = Field(0.2, ge=0, lt=1, description="Largest relative change of saturation.")
