"""How a cube's features become channels and come back: which are scaled numbers, which are classes,
which are zero-heavy amounts.

Everything here is a pure function of the feature table. Values that are not valid never reach the
network: they become 0, and the mask is a channel of its own. Order of outputs: continuous ones,
then each categorical's logits, then two for each canopy. Continuous features are centred and
divided by their range, which is what distortion is judged over (rate/distortion.py), with one factor for all
that brings their mean variance to 1. Divided each by its own deviation, a band of little contrast
costs as much as one of much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warehouse.errors import TrainingError
from warehouse.layouts.cube_geometry import Feature

__all__ = ["Channels", "Truth", "units"]

MOST_WEIGHT = 10.0
MOST_DEVIATIONS, LEAST_UNIT = 8.0, 1e-6


class Truth(NamedTuple):
    """What a block says, channels first. values: float32 [B, Q, T, Y, X], (value - mean) / unit, 0
    where not valid (Q continuous features); values_mask: bool of the same shape; classes: int64 [B,
    C, T, Y, X], -1 where not valid; amounts: float32 [B, A, T, Y, X], log1p(value / scale), 0 where
    not valid; amounts_mask: bool."""

    values: Tensor
    values_mask: Tensor
    classes: Tensor
    amounts: Tensor
    amounts_mask: Tensor


def units(features: Sequence[Feature]) -> list[float]:
    """What 1 stands for in each continuous feature: its range over valid training voxels, times the
    factor that makes the mean variance 1.

    A range counts as MOST_DEVIATIONS standard deviations at most: one stray value must not hide
    what a feature otherwise says.
    """
    deviations = [each.std or 0.0 for each in features]
    ranges = [
        max(
            min((each.maximum or 0.0) - (each.minimum or 0.0), MOST_DEVIATIONS * std),
            std,
            LEAST_UNIT,
        )
        for each, std in zip(features, deviations, strict=True)
    ]
    # A feature that never varies says nothing of how the others should be scaled.
    shares = [(std / size) ** 2 for std, size in zip(deviations, ranges, strict=True) if std > 0]
    factor = math.sqrt(sum(shares) / len(shares)) if shares else 1.0
    return [max(size * factor, LEAST_UNIT) for size in ranges]


class Channels(nn.Module):
    """The feature table as tensors; it has no weights and no state.

    Raises TrainingError for a table without statistics.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.features = tuple(features)
        for feature in self.features:
            known = (
                sum(feature.class_counts) > 0
                if feature.kind == "categorical"
                else feature.mean is not None
            )
            if not known:
                raise TrainingError(
                    "a feature has no valid training voxel",
                    where=feature.name,
                    remedy="leave it out of raster.features, or give it data inside the training blocks",
                )
        self.continuous, self.categorical, self.canopy = (
            [number for number, feature in enumerate(self.features) if feature.kind == kind]
            for kind in ("continuous", "categorical", "canopy")
        )
        self.mean: Tensor
        self.unit: Tensor
        self.scale: Tensor
        self._keep("mean", [self.features[number].mean or 0.0 for number in self.continuous])
        self._keep("unit", units([self.features[number] for number in self.continuous]))
        self._keep(
            "scale", [max(self.features[number].mean or 0.0, 1e-6) for number in self.canopy]
        )
        for number in self.categorical:
            codes, counts = self.features[number].codes, self.features[number].class_counts
            self._keep(f"codes_{number}", sorted(codes))
            by_code = dict(zip(codes, counts, strict=True))
            share = [by_code[code] / sum(counts) * len(codes) for code in sorted(codes)]
            # Inverse frequency; a class that training never shows weighs nothing.
            self._keep(
                f"weight_{number}", [min(MOST_WEIGHT, 1 / part) if part else 0.0 for part in share]
            )

    def _keep(self, name: str, numbers: Sequence[float]) -> None:
        self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32), persistent=False)

    @property
    def class_counts(self) -> list[int]:
        return [len(self.features[number].codes) for number in self.categorical]

    @property
    def outputs(self) -> int:
        return len(self.continuous) + sum(self.class_counts) + 2 * len(self.canopy)

    def class_weight(self, place: int) -> Tensor:
        """float32 [codes], of the place-th categorical feature, in the order of sorted codes."""
        weight: Tensor = getattr(self, f"weight_{self.categorical[place]}")
        return weight

    def truth(self, data: Tensor, valid: Tensor) -> Truth:
        """data: float32 [B, T, Y, X, F]; valid: bool of the same shape.

        NaN and codes that were not declared are not valid.
        """
        valid = valid & torch.isfinite(data)
        value, mask = data.movedim(-1, 1), valid.movedim(-1, 1)
        shape = (-1, 1, 1, 1)
        values_mask, amounts_mask = mask[:, self.continuous], mask[:, self.canopy]
        values = (
            (value[:, self.continuous] - self.mean.view(shape)) / self.unit.view(shape)
        ).masked_fill(~values_mask, 0.0)
        amounts = (
            (value[:, self.canopy].clamp_min(0) / self.scale.view(shape))
            .log1p()
            .masked_fill(~amounts_mask, 0.0)
        )
        classes = [
            self._classes(value[:, number], mask[:, number], number) for number in self.categorical
        ]
        stacked = (
            torch.stack(classes, dim=1)
            if classes
            else torch.empty(
                (len(data), 0, *data.shape[1:4]), dtype=torch.int64, device=data.device
            )
        )
        return Truth(values, values_mask, stacked, amounts, amounts_mask)

    def _classes(self, value: Tensor, mask: Tensor, number: int) -> Tensor:
        codes: Tensor = getattr(self, f"codes_{number}")
        place = torch.searchsorted(codes, value.masked_fill(~mask, 0.0).contiguous()).clamp_max(
            len(codes) - 1
        )
        return torch.where(mask & (codes[place] == value), place, -1)

    def logits(self, said: Tensor) -> list[Tensor]:
        """The [B, codes, T, Y, X] part of said [B, outputs, T, Y, X] for each categorical feature."""
        first = len(self.continuous)
        return (
            list(said[:, first : first + sum(self.class_counts)].split(self.class_counts, dim=1))
            if self.categorical
            else []
        )

    def amounts(self, said: Tensor) -> tuple[Tensor, Tensor]:
        """(logit of being above zero, log1p of the amount), [B, A, T, Y, X] each."""
        present, amount = said[:, said.shape[1] - 2 * len(self.canopy) :].chunk(2, dim=1)
        return present, amount

    def physical(self, said: Tensor) -> Tensor:
        """said [B, outputs, T, Y, X] as data float32 [B, T, Y, X, F].

        Units and codes as stored, inside the range training showed.
        """
        data = said.new_empty((len(said), len(self.features), *said.shape[2:]), dtype=torch.float32)
        for place, number in enumerate(self.continuous):
            data[:, number] = self._inside(
                said[:, place].float() * self.unit[place] + self.mean[place], number
            )
        for number, logits in zip(self.categorical, self.logits(said), strict=True):
            codes: Tensor = getattr(self, f"codes_{number}")
            data[:, number] = codes[logits.argmax(dim=1)]
        present, amount = self.amounts(said)
        for place, number in enumerate(self.canopy):
            height = amount[:, place].float().clamp(0, 20).expm1() * self.scale[place]
            data[:, number] = torch.where(present[:, place] > 0, self._inside(height, number), 0.0)
        return data.movedim(1, -1).contiguous()

    def _inside(self, value: Tensor, number: int) -> Tensor:
        return value.clamp(self.features[number].minimum, self.features[number].maximum)
