"""The settings that all trainers share.

Purpose: `TrainSettings`, the keys of the training loop; `AugmentSettings`, the keys of image
  augmentation. Trainers derive their own sections from them.
Used by: detector.settings, detector.task, features.settings, segmentation.settings, utils.augment,
  utils.training.loop, vqvae.settings
Design notes: this module imports no torch, so that a command can print its `--help` quickly.
Assistant guidance: when extending: a setting that does not change the losses belongs in MAY_CHANGE, so that a resumed
  run may have another value.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from warehouse.settings import Section

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
    "warehouse",
}


MAY_CHANGE |= {"cache_transformed_tensors", "cache_limit_mb"}
"""Settings a resumed run may have otherwise; all others decide its losses."""


class TrainSettings(Section):
    """What every trainer's section has.

    `epochs: null` needs `max_minutes`, and then time alone decides.
    """

    epochs: int | None = Field(20, ge=1)
    max_minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1, le=65_536)
    lr: float | None = Field(None, gt=0, description="null: what suits the model")
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float = Field(10.0, gt=0)
    average: float = Field(
        0.998,
        ge=0,
        lt=1,
        description="decay of the running average of the weights, which is what is kept; 0: none",
    )
    accumulate: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    device: str = "auto"
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    log_interval: int = Field(10, ge=1)
    evaluate_every: int = Field(1, ge=1, description="epochs")
    status_file: str | None = None
    limit_batches: int | None = Field(None, ge=1)
    cache_transformed_tensors: bool | None = Field(
        None, description="held-out batches after their first pass; null: where all fit"
    )
    cache_limit_mb: int = Field(1024, ge=1)
    output: str | None = None
    resume: bool = False

    @model_validator(mode="after")
    def _something_ends_it(self) -> TrainSettings:
        if self.epochs is None and self.max_minutes is None:
            raise ValueError("with epochs null, max_minutes must say when to stop")
        return self


class AugmentSettings(Section):
    """What may happen to a picture. Flips are probabilities; the others are the largest relative
    change, 0 for none.

    zoom 0.35 scales by 1/1.35 to 1.35 and moves what is then loose; aspect stretches one axis
    against the other.
    """

    flip_x: float = Field(0.5, ge=0, le=1)
    flip_y: float = Field(0.0, ge=0, le=1)
    zoom: float = Field(0.35, ge=0, lt=1)
    aspect: float = Field(0.1, ge=0, lt=1)
    brightness: float = Field(0.2, ge=0, lt=1)
    contrast: float = Field(0.2, ge=0, lt=1)
    saturation: float = Field(0.2, ge=0, lt=1)
