"""A cube's features as the network's channels, and back.

Everything here is a pure function of the feature table. Values that are not valid never reach the
network: they become 0, and the mask is a channel of its own. The outputs are in this order: the
continuous features, then the logits of each categorical one, then two channels for each canopy.

Continuous features are centred and divided by their range, which is what distortion is judged over
(rate/distortion.py), with one factor for all that brings their mean variance to 1. Divided each by
its own deviation instead, a band of little contrast costs as much as one of much: what took 14.5
minutes of training before takes 5 (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warehouse.errors import TrainingError
from warehouse.layouts.features import Feature

__all__ = ["Channels", "Truth", "units"]

MOST_WEIGHT = 10.0
"""Of a rare class in the loss: without a limit a handful of voxels would decide it."""

MOST_DEVIATIONS, LEAST_UNIT = 8.0, 1e-6


class Truth(NamedTuple):
    """What a block says, channels first.

    Parameters
    ----------
    values
        float32 [B, Q, T, Y, X], (value - mean) / unit of the Q continuous
        features; 0 where not valid.
    values_mask
        bool, the same shape.
    classes
        int64 [B, C, T, Y, X], positions among the sorted codes; -1 where not
        valid.
    amounts
        float32 [B, A, T, Y, X], log1p(value / scale) of the canopies; 0 where
        not valid.
    amounts_mask
        bool, the same shape.
    """

    values: Tensor
    values_mask: Tensor
    classes: Tensor
    amounts: Tensor
    amounts_mask: Tensor


def units(features: Sequence[Feature]) -> list[float]:
    """Return what 1 stands for in each continuous feature, in physical units.

    It is the range over valid training voxels, times the factor that makes the mean
    variance 1. A range counts as MOST_DEVIATIONS standard deviations at most: one
    stray value must not hide what a feature otherwise says.
    """
    ranges, shares = [], []
    for feature in features:
        std = feature.std or 0.0
        full = (feature.maximum or 0.0) - (feature.minimum or 0.0)
        # The range is what distortion is judged over. Divided by its own deviation, a band of
        # little contrast costs as much as one of much (docs/log.md).
        size = max(min(full, MOST_DEVIATIONS * std), std, LEAST_UNIT)
        ranges.append(size)
        # A feature that never varies says nothing of how the others should be scaled.
        if std > 0:
            shares.append((std / size) ** 2)

    factor = math.sqrt(sum(shares) / len(shares)) if shares else 1.0
    return [max(size * factor, LEAST_UNIT) for size in ranges]


class Channels(nn.Module):
    """The feature table as tensors. It has no weights and no state.

    Parameters
    ----------
    features
        The cube's features, with training statistics.

    Raises
    ------
    TrainingError
        A feature has no statistics.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        super().__init__()
        self.features = tuple(features)
        for feature in self.features:
            _check_statistics(feature)
        self.continuous = self._of_kind("continuous")
        self.categorical = self._of_kind("categorical")
        self.canopy = self._of_kind("canopy")

        self.mean: Tensor
        self.unit: Tensor
        self.scale: Tensor
        means = [feature.mean or 0.0 for feature in self.features]
        self._keep("mean", [means[number] for number in self.continuous])
        self._keep("unit", units([self.features[number] for number in self.continuous]))
        self._keep("scale", [max(means[number], 1e-6) for number in self.canopy])
        for number in self.categorical:
            feature = self.features[number]
            self._keep(f"codes_{number}", sorted(feature.codes))
            self._keep(f"weight_{number}", _class_weights(feature))

    def _of_kind(self, kind: str) -> list[int]:
        return [number for number, feature in enumerate(self.features) if feature.kind == kind]

    def _keep(self, name: str, numbers: Sequence[float]) -> None:
        # Not in checkpoints: they follow from the feature table, which is.
        self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32), persistent=False)

    @property
    def class_counts(self) -> list[int]:
        """Classes of each categorical feature."""
        return [len(self.features[number].codes) for number in self.categorical]

    @property
    def outputs(self) -> int:
        """Channels of the network's outputs."""
        return len(self.continuous) + sum(self.class_counts) + 2 * len(self.canopy)

    def class_weight(self, position: int) -> Tensor:
        """Return the loss weights of a categorical feature's classes.

        Parameters
        ----------
        position
            Among the categorical features.

        Returns
        -------
        Tensor
            float32 [codes], in the order of the sorted codes.
        """
        weight: Tensor = getattr(self, f"weight_{self.categorical[position]}")
        return weight

    def truth(self, data: Tensor, valid: Tensor) -> Truth:
        """Return a batch as the network's channels.

        Parameters
        ----------
        data
            float32 [B, T, Y, X, F].
        valid
            bool, the same shape. NaN, and codes that were not declared, are not
            valid either.
        """
        # One NaN that is marked valid would make the whole loss NaN, and then the weights.
        valid = valid & torch.isfinite(data)
        value, mask = data.movedim(-1, 1), valid.movedim(-1, 1)
        shape = (-1, 1, 1, 1)

        values_mask = mask[:, self.continuous]
        centred = value[:, self.continuous] - self.mean.view(shape)
        values = (centred / self.unit.view(shape)).masked_fill(~values_mask, 0.0)

        amounts_mask = mask[:, self.canopy]
        # log1p of less than -1 is NaN.
        relative = value[:, self.canopy].clamp_min(0) / self.scale.view(shape)
        amounts = relative.log1p().masked_fill(~amounts_mask, 0.0)

        classes = data.new_empty((len(data), 0, *data.shape[1:4]), dtype=torch.int64)
        if self.categorical:
            every = [
                self._classes(value[:, number], mask[:, number], number)
                for number in self.categorical
            ]
            classes = torch.stack(every, dim=1)
        return Truth(values, values_mask, classes, amounts, amounts_mask)

    def _classes(self, value: Tensor, mask: Tensor, number: int) -> Tensor:
        """Return positions among the sorted codes, -1 where not valid or not declared."""
        codes = self._codes(number)
        found = torch.searchsorted(codes, value.masked_fill(~mask, 0.0).contiguous())
        position = found.clamp_max(len(codes) - 1)
        # A code that was not declared counts as missing; the nearest declared one would be a class
        # that is not there.
        return torch.where(mask & (codes[position] == value), position, -1)

    def _codes(self, number: int) -> Tensor:
        codes: Tensor = getattr(self, f"codes_{number}")
        return codes

    def logits(self, outputs: Tensor) -> list[Tensor]:
        """Return the logits [B, codes, T, Y, X] of each categorical feature.

        Parameters
        ----------
        outputs
            Of the network, [B, outputs, T, Y, X].
        """
        if not self.categorical:
            return []
        first, count = len(self.continuous), sum(self.class_counts)
        return list(torch.split(outputs[:, first : first + count], self.class_counts, dim=1))

    def amounts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the canopies' (logit of being above zero, log1p of the amount).

        Parameters
        ----------
        outputs
            Of the network, [B, outputs, T, Y, X].

        Returns
        -------
        tuple of Tensor
            [B, A, T, Y, X] each.
        """
        first = outputs.shape[1] - 2 * len(self.canopy)
        present, amount = outputs[:, first:].chunk(2, dim=1)
        return present, amount

    def physical(self, outputs: Tensor) -> Tensor:
        """Return the network's outputs as data.

        Parameters
        ----------
        outputs
            [B, outputs, T, Y, X].

        Returns
        -------
        Tensor
            float32 [B, T, Y, X, F] in units and codes as stored, inside the range
            of the training data.
        """
        size = (len(outputs), len(self.features), *outputs.shape[2:])
        data = outputs.new_empty(size, dtype=torch.float32)

        for position, number in enumerate(self.continuous):
            value = outputs[:, position].float() * self.unit[position] + self.mean[position]
            data[:, number] = self._inside(value, number)

        for number, logits in zip(self.categorical, self.logits(outputs), strict=True):
            # The most likely class and not a mean of codes: codes between two classes mean nothing.
            data[:, number] = self._codes(number)[logits.argmax(dim=1)]

        present, amount = self.amounts(outputs)
        for position, number in enumerate(self.canopy):
            # An untrained network may say anything; exp(20) still is a finite float32.
            relative = amount[:, position].float().clamp(0, 20).expm1()
            height = self._inside(relative * self.scale[position], number)
            data[:, number] = torch.where(present[:, position] > 0, height, 0.0)
        return data.movedim(1, -1).contiguous()

    def _inside(self, value: Tensor, number: int) -> Tensor:
        feature = self.features[number]
        # An output beyond what training showed is an extrapolation, such as a negative reflectance.
        return value.clamp(feature.minimum, feature.maximum)


def _check_statistics(feature: Feature) -> None:
    if feature.kind == "categorical":
        known = sum(feature.class_counts) > 0
    else:
        known = feature.mean is not None
    if not known:
        raise TrainingError(
            "a feature has no valid training voxel",
            where=feature.name,
            remedy="leave it out of raster.features, or give it data inside the training blocks",
        )


def _class_weights(feature: Feature) -> list[float]:
    """Return inverse frequencies in the order of sorted codes; 0 for classes without training data.

    They are over the mean frequency, so that even classes weigh 1 each.
    """
    counts = dict(zip(feature.codes, feature.class_counts, strict=True))
    total = sum(feature.class_counts)
    weights = []
    for code in sorted(feature.codes):
        share = counts[code] / total * len(feature.codes)
        weights.append(min(MOST_WEIGHT, 1 / share) if share else 0.0)
    return weights
