"""Held-out figures of a reconstruction, added up over batches.

Errors in physical units, classes, codes in use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqvae.channels import Channels
from vqvae.losses import TERMS
from vqvae.model import Reconstruction
from vqvae.quantizers.codebook import perplexity

__all__ = ["Tally", "as_result"]


class Tally:
    """Sums over held-out samples; `metrics()` at the end.

    Counts are exact, errors are summed in float64.
    """

    def __init__(
        self, channels: Channels, codebook_size: int, levels: int, device: torch.device
    ) -> None:
        self.channels = channels
        self.samples = 0
        exact = {
            "dtype": torch.float64 if device.type != "mps" else torch.float32,
            "device": device,
        }
        count = len(channels.features)
        self.terms = torch.zeros(len(TERMS), **exact)
        self.squared, self.absolute, self.voxels = (torch.zeros(count, **exact) for _ in range(3))
        self.codes = torch.zeros((levels, codebook_size), dtype=torch.int64, device=device)
        self.confusion = {
            number: torch.zeros((size, size), dtype=torch.int64, device=device)
            for number, size in zip(channels.categorical, channels.class_counts, strict=True)
        }

    def add(
        self,
        data: Tensor,
        valid: Tensor,
        physical: Tensor,
        found: Reconstruction,
        terms: dict[str, Tensor],
    ) -> None:
        """data, physical: float32 [B, T, Y, X, F] of truth and reconstruction; terms.

        As `loss_terms` gives them.
        """
        self.samples += len(data)
        self.terms += torch.stack([terms[name].sum() for name in TERMS])
        valid = valid & torch.isfinite(data)
        error = (physical - data).masked_fill(~valid, 0.0).to(self.squared.dtype)
        self.squared += error.square().sum(dim=(0, 1, 2, 3))
        self.absolute += error.abs().sum(dim=(0, 1, 2, 3))
        self.voxels += valid.sum(dim=(0, 1, 2, 3))
        for level in range(len(self.codes)):
            self.codes[level] += torch.bincount(
                found.codes[:, level].reshape(-1), minlength=self.codes.shape[1]
            )
        truth = self.channels.truth(data, valid).classes
        for place, number in enumerate(self.confusion):
            known = truth[:, place] >= 0
            said = self.channels.logits(found.said)[place].argmax(dim=1)
            size = self.channels.class_counts[place]
            cells = torch.bincount((truth[:, place] * size + said)[known], minlength=size * size)
            self.confusion[number] += cells.reshape(size, size)

    def metrics(self) -> dict[str, float]:
        """Loss terms a sample; perplexity, usage (share of first-level codes used at all);
        rmse.<feature>; accuracy, miou, canopy_mae.

        accuracy and miou are means over the categorical features (mean IoU over classes that occur
        in truth or guess), canopy_mae over the canopy features; what a cube has none of is not
        there.
        """
        figures = dict(zip(TERMS, (self.terms / max(1, self.samples)).tolist(), strict=True))
        found = perplexity(self.codes).tolist()
        figures |= {"perplexity": found[0], "usage": float((self.codes[0] > 0).double().mean())}
        figures |= {f"perplexity_{level}": value for level, value in enumerate(found[1:], 2)}
        count = self.voxels.clamp_min(1)
        rmse, absolute = (self.squared / count).sqrt().tolist(), (self.absolute / count).tolist()
        for number, feature in enumerate(self.channels.features):
            if feature.kind != "categorical":
                figures[f"rmse.{feature.name}"] = rmse[number]
        if self.channels.canopy:
            figures["canopy_mae"] = sum(absolute[number] for number in self.channels.canopy) / len(
                self.channels.canopy
            )
        if self.confusion:
            scores = [_scores(table) for table in self.confusion.values()]
            figures["accuracy"], figures["miou"] = (
                sum(values) / len(scores) for values in zip(*scores, strict=True)
            )
        return figures


def _scores(confusion: Tensor) -> tuple[float, float]:
    """(accuracy, mean IoU) of a confusion matrix [truth, guess]."""
    right, union = (
        confusion.diagonal().double(),
        (confusion.sum(0) + confusion.sum(1) - confusion.diagonal()).double(),
    )
    present = union > 0
    if not bool(present.any()):
        return 0.0, 0.0
    return float(right.sum() / confusion.sum()), float((right[present] / union[present]).mean())


def as_result(result: dict[str, Any]) -> dict[str, Any]:
    """The loop's result with `rmse` as one mapping.

    Accuracy, miou and canopy_mae are null where the cube has no such feature.
    """
    rmse = {
        key.removeprefix("rmse."): value for key, value in result.items() if key.startswith("rmse.")
    }
    rest = {key: value for key, value in result.items() if not key.startswith("rmse.")}
    return {"accuracy": None, "miou": None, "canopy_mae": None, **rest, "rmse": rmse}
