"""The `detector` and `infer` sections: what is trained, and what a trained detector is applied to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from utils.training.settings import AugmentSettings, TrainSettings
from warehouse.settings import Section

__all__ = ["DetectorSettings", "InferSettings"]


class DetectorSettings(TrainSettings, AugmentSettings):
    """What `train_detector` trains, on what, for how long.

    The augmentation's keys stand beside the loop's.
    """

    model: Literal["tiny", "big"] = "tiny"
    warehouse: str | None = Field(
        None,
        description="a warehouse or one of its versions; null: the newest under build.output_root",
    )
    max_boxes: int | None = Field(
        None, ge=1, le=10_000, description="must be the store's; null: take the store's"
    )
    width: int | None = Field(
        None, ge=8, le=512, description="channels of the first stage; null: 24 for tiny, 32 for big"
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="of augmentation: scales zoom, aspect and colour jitter; null: 0 for tiny (flips only), 1 for big",
    )
    box_l1: float = Field(5.0, ge=0)
    box_giou: float = Field(2.0, ge=0)


class InferSettings(Section):
    """What `infer_view` looks at, with what, and where it puts the pictures."""

    checkpoint: str = "checkpoints/bigdet"
    input: str | None = Field(
        None,
        description="a picture, a folder or a warehouse; null: the newest under build.output_root",
    )
    split: str = "val"
    threshold: float = Field(0.5, ge=0, le=1)
    limit: int = Field(200, ge=1, le=10_000, description="pictures at most")
    batch_size: int = Field(16, ge=1)
    device: str = "auto"
    output: str = "artifacts/view"
