"""The `sample` section: which synthetic data set `make_sample` draws, and how large."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from warehouse.section import Section

__all__ = ["SampleSettings"]


class SampleSettings(Section):
    """What `make_sample` draws, how many, and where to."""

    kind: Literal["boxes", "cube", "classes", "masks"] = Field(
        "boxes",
        description=(
            "Kind of data set to generate: boxes, cube (GeoTIFFs of one place), classes (a folder "
            "per class) or masks."
        ),
    )
    format: Literal["voc", "coco", "yolo"] = Field(
        "voc", description="Annotation format for kind boxes: voc, coco or yolo."
    )
    count: int = Field(
        64, ge=1, le=100_000, description="Number of images, or of dates for kind cube."
    )
    size: tuple[int, int] = Field(
        (384, 384), description="Height and width of each image in pixels."
    )
    seed: int = Field(0, ge=0, description="Seed from which the data set is generated.")
    single_box: bool = Field(
        False,
        description="Draw exactly one box in every image; detector.model tiny cannot detect more.",
    )
    output: str = Field("artifacts/sample", description="Folder in which the data set is written.")

    @field_validator("size")
    @classmethod
    def _size_is_sane(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not all(64 <= side <= 4096 for side in value):
            raise ValueError(
                f"both sides (H, W) must be between 64 and 4096 pixels, not {list(value)}"
            )
        return value
