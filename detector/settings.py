"""The `detector` and `infer` sections: what is trained, and what a detector is applied to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from utils.training.settings import AugmentSettings, TrainSettings
from warehouse.section import Section

__all__ = ["DetectorSettings", "InferSettings"]


class DetectorSettings(TrainSettings, AugmentSettings):
    """What `train_detector` trains, on what, and for how long.

    The keys of the augmentation and of the training loop belong to the same section.
    """

    model: Literal["tiny", "big"] = Field(
        "tiny", description="tiny finds one box per image; big finds up to max_boxes."
    )
    warehouse: str | None = Field(
        None,
        description=(
            "Warehouse, or one of its versions; null means the newest version under "
            "build.output_root."
        ),
    )
    # For a check only: the number of box slots is fixed when a warehouse is built.
    max_boxes: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description=(
            "Largest number of boxes per image; it must equal that of the warehouse. null means "
            "that of the warehouse."
        ),
    )
    width: int | None = Field(
        None,
        ge=8,
        le=512,
        description="Number of channels of the first stage; null means 24 for tiny and 32 for big.",
    )
    # One factor rather than other defaults for tiny: the keys then mean the same for both models.
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description=(
            "Factor that scales zoom, aspect and colour changes; null means 0 for tiny (flips "
            "only) and 1 for big."
        ),
    )
    box_l1: float = Field(5.0, ge=0, description="Weight of the L1 loss of the box corners.")
    box_giou: float = Field(2.0, ge=0, description="Weight of the GIoU loss of the boxes.")


class InferSettings(Section):
    """What `infer_view` draws, with which detector, and where it writes the images."""

    checkpoint: str = Field("checkpoints/bigdet", description="Folder of the trained detector.")
    input: str | None = Field(
        None,
        description=(
            "Image, folder of images or warehouse; null means the newest version under "
            "build.output_root."
        ),
    )
    split: str = Field("val", description="Split of the warehouse that is shown.")
    threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description=(
            "Lowest score of the boxes that are drawn; you can change it with a slider on the page."
        ),
    )
    # All images are embedded in one page, which a browser has to hold in memory.
    limit: int = Field(200, ge=1, le=10_000, description="Largest number of images that are shown.")
    batch_size: int = Field(16, ge=1, description="Images per batch.")
    device: str = Field(
        "auto",
        description=(
            "Device to compute on: auto (a GPU if there is one), cpu, cuda, cuda:1, and so on."
        ),
    )
    output: str = Field("artifacts/view", description="Folder for the images and index.html.")
