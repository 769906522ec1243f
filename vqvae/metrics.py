"""Held-out figures of a reconstruction, added up over batches.

They are errors in physical units, classes, and codes in use.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from utils.training.confusion import ConfusionMatrix
from vqvae.losses import TERMS
from vqvae.network.channels import Channels
from vqvae.network.model import Reconstruction
from vqvae.quantizers.codebook import perplexity

__all__ = ["Tally", "as_result"]


class Tally:
    """Sums over held-out samples; `metrics()` at the end.

    Parameters
    ----------
    channels
        The feature table.
    codebook_size, levels
        K and L of the quantizer.
    device
        Where the sums are kept. Counts are exact, errors are summed in float64.
    """

    def __init__(
        self, channels: Channels, codebook_size: int, levels: int, device: torch.device
    ) -> None:
        self.channels = channels
        self.samples = 0
        # Metal has no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        count = len(channels.features)
        self.terms = torch.zeros(len(TERMS), dtype=dtype, device=device)
        self.squared = torch.zeros(count, dtype=dtype, device=device)
        self.absolute = torch.zeros(count, dtype=dtype, device=device)
        self.voxels = torch.zeros(count, dtype=dtype, device=device)
        self.codes = torch.zeros((levels, codebook_size), dtype=torch.int64, device=device)
        self.confusion = {
            number: ConfusionMatrix(size)
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
        """Add a batch.

        Parameters
        ----------
        data, valid
            float32 and bool [B, T, Y, X, F].
        physical
            float32, the same shape: the reconstruction in units and codes.
        found
            What the model made of the batch.
        terms
            Of `loss_terms`, [B] each.
        """
        self.samples += len(data)
        # Sums on the device, without waiting for it at every batch.
        self.terms += torch.stack([terms[name].sum() for name in TERMS])

        valid = valid & torch.isfinite(data)
        # Masked and not multiplied: data may be NaN where not valid, and NaN times 0 is NaN.
        error = (physical - data).masked_fill(~valid, 0.0).to(self.squared.dtype)
        self.squared += error.square().sum(dim=(0, 1, 2, 3))
        self.absolute += error.abs().sum(dim=(0, 1, 2, 3))
        self.voxels += valid.sum(dim=(0, 1, 2, 3))

        size = self.codes.shape[1]
        for level in range(len(self.codes)):
            self.codes[level] += torch.bincount(found.codes[:, level].reshape(-1), minlength=size)
        self._add_classes(data, valid, found)

    def _add_classes(self, data: Tensor, valid: Tensor, found: Reconstruction) -> None:
        truth = self.channels.truth(data, valid).classes
        every = self.channels.logits(found.outputs)
        for position, (number, logits) in enumerate(zip(self.confusion, every, strict=True)):
            classes, guess = truth[:, position], logits.argmax(dim=1)
            known = classes >= 0
            self.confusion[number].add(classes[known], guess[known])

    def metrics(self) -> dict[str, float]:
        """Return the figures of all samples.

        Returns
        -------
        dict of str to float
            TERMS: loss terms a sample. perplexity, perplexity_<l>: of the levels.
            usage: share of the first level's codes used at all. rmse.<feature>.
            accuracy, miou: means over the categorical features, IoU over classes
            that occur in truth or guess. canopy_mae: mean over the canopies. What a
            cube has none of is absent.
        """
        terms = (self.terms / max(1, self.samples)).tolist()
        figures = dict(zip(TERMS, terms, strict=True))

        # Over all held-out tokens: the perplexity of a batch is limited by its few tokens, and a
        # mean over batches would be too.
        first, *others = perplexity(self.codes).tolist()
        figures |= {
            "perplexity": first,
            "usage": float((self.codes[0] > 0).double().mean()),
        }
        figures |= {f"perplexity_{level}": value for level, value in enumerate(others, 2)}

        count = self.voxels.clamp_min(1)
        rmse = (self.squared / count).sqrt().tolist()
        for number, feature in enumerate(self.channels.features):
            if feature.kind != "categorical":
                # The difference of two class codes has no unit.
                figures[f"rmse.{feature.name}"] = rmse[number]

        canopy = self.channels.canopy
        if canopy:
            absolute = (self.absolute / count).tolist()
            figures["canopy_mae"] = sum(absolute[number] for number in canopy) / len(canopy)
        if self.confusion:
            tables = self.confusion.values()
            figures["accuracy"] = sum(table.accuracy for table in tables) / len(tables)
            figures["miou"] = sum(table.mean_iou for table in tables) / len(tables)
        return figures


def as_result(result: Mapping[str, object]) -> dict[str, object]:
    """Return the training loop's result as the command prints it.

    `rmse` becomes one mapping; accuracy, miou and canopy_mae are null where the
    cube has no such feature.
    """
    prefix = "rmse."
    rmse, rest = {}, {}
    for key, value in result.items():
        if key.startswith(prefix):
            rmse[key.removeprefix(prefix)] = value
        else:
            rest[key] = value
    return {"accuracy": None, "miou": None, "canopy_mae": None, **rest, "rmse": rmse}
