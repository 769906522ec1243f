"""What a cube's features are: the table in the attributes of `cube/data` and in the manifest, one `Feature` a column of the last axis.

Categorical values are stored as their codes (float32, NaN where missing); statistics are over valid voxels of the training split.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Feature"]

Kind = Literal["continuous", "categorical", "canopy"]


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of a cube. `codes` and `class_counts` (valid training voxels a code, same order) are for categorical ones only.

    mean, std, minimum, maximum: over valid training voxels, in physical units; None where there is none (categorical, or no voxel).
    valid_share: valid training voxels / all training voxels. static: repeated along time.
    """

    name: str
    kind: Kind
    codes: tuple[int, ...] = ()
    class_counts: tuple[int, ...] = ()
    mean: float | None = None
    std: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    valid_share: float = 1.0
    static: bool = False
    units: str | None = None

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Feature:
        return cls(**(raw | {"codes": tuple(raw["codes"]), "class_counts": tuple(raw["class_counts"])}))

    def to_json(self) -> dict[str, Any]:
        raw = asdict(self)
        return raw | {"codes": list(self.codes), "class_counts": list(self.class_counts)}
