"""The `sample` section: which synthetic data set `make_sample` draws, and how large."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from warehouse.settings import Section

__all__ = ["SampleSettings"]


class SampleSettings(Section):
    """What `make_sample` draws, how many, and where to."""

    kind: Literal["boxes", "cube", "classes", "masks"] = "boxes"
    format: Literal["voc", "coco", "yolo"] = "voc"
    count: int = Field(64, ge=1, le=100_000)
    size: tuple[int, int] = (384, 384)
    seed: int = Field(0, ge=0)
    single_box: bool = False
    output: str = "artifacts/sample"

    @field_validator("size")
    @classmethod
    def _size_is_sane(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not all(64 <= side <= 4096 for side in value):
            raise ValueError(
                f"both sides (H, W) must be between 64 and 4096 pixels, not {list(value)}"
            )
        return value
