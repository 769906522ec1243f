"""A feature: one named column of a cube's last axis."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

__all__ = ["Feature", "Kind"]

Kind = Literal["continuous", "categorical", "canopy"]


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature of a cube.

    Attributes
    ----------
    codes, class_counts
        Of a categorical feature: its values, and the valid training voxels of each.
    mean, std, minimum, maximum
        Over valid training voxels, in physical units; None where there is none (a categorical
        feature, or no voxel).
    valid_share
        Valid training voxels / all training voxels.
    static
        Whether the feature is repeated along time.
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
    def of(cls, raw: dict[str, Any]) -> Self:
        """A feature from the manifest's JSON."""
        lists = {key: tuple(raw[key]) for key in ("codes", "class_counts")}
        return cls(**(raw | lists))

    def to_json(self) -> dict[str, Any]:
        """The manifest's JSON."""
        lists = {"codes": list(self.codes), "class_counts": list(self.class_counts)}
        return asdict(self) | lists
