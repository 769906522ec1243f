"""A feature is one named column of a cube's last axis.

Invariant: a feature survives `Feature.of(feature.to_json())` unchanged, since manifests, Zarr
attributes and checkpoints keep it as JSON. It lies outside the folder of cubes because models and
derived versions describe their channels by features too.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        Valid training voxels divided by all training voxels.
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
    def of(cls, raw: Mapping[str, Any]) -> Self:
        """Return a feature from the manifest's JSON."""
        # JSON has no tuples, and a frozen dataclass with a list in it has no hash.
        lists = {key: tuple(raw[key]) for key in ("codes", "class_counts")}
        return cls(**{**raw, **lists})

    def to_json(self) -> dict[str, Any]:
        """Return the feature as the manifest's JSON."""
        # `asdict` keeps tuples, which would not compare equal to what is read back.
        lists = {"codes": list(self.codes), "class_counts": list(self.class_counts)}
        return asdict(self) | lists
