"""The loss terms of a reconstruction, a number a sample: `cont`, `cat`, `canopy`, `vq`, and
`total`, their weighted sum.

Every valid voxel weighs the same: a sample's term is the sum over its valid voxels divided by all
its voxels, so that sums over samples, batches and ranks are right whatever is missing where. A term
whose kind of feature the cube does not have is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from vqvae.channels import Channels, Truth
from vqvae.model import Reconstruction

__all__ = ["TERMS", "Weights", "loss_terms"]

TERMS = ("cont", "cat", "canopy", "vq", "total")


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the terms in `total`. beta: commitment to the codes (van den Oord 2017); huber: where the
    squared error of a continuous feature becomes linear, in scaled units (channels.py); None:
    never."""

    cat: float = 0.1
    canopy: float = 0.2
    beta: float = 0.25
    huber: float | None = None


def loss_terms(
    found: Reconstruction, truth: Truth, channels: Channels, weights: Weights
) -> dict[str, Tensor]:
    """Each of TERMS as float32 [B].

    cont: squared error of scaled values (channels.py) (Huber x 2 beyond `huber`), mean over
    features. cat: cross-entropy in nats with inverse-frequency class weights. canopy: binary
    cross-entropy of being above zero + squared error of log1p(amount) where it is.
    """
    said = found.said.float()
    terms = {
        "cont": _cont(said, truth, weights.huber),
        "cat": _cat(said, truth, channels),
        "canopy": _canopy(said, truth, channels),
        "vq": weights.beta * found.commit,
    }
    total = (
        terms["cont"] + weights.cat * terms["cat"] + weights.canopy * terms["canopy"] + terms["vq"]
    )
    return {**terms, "total": total}


def _mean(error: Tensor) -> Tensor:
    """[B, features, T, Y, X] with 0 where not valid, to [B]."""
    return error.flatten(1).mean(dim=1) if error.shape[1] else error.new_zeros(len(error))


def _cont(said: Tensor, truth: Truth, huber: float | None) -> Tensor:
    guess = said[:, : truth.values.shape[1]]
    if huber is None:
        error = functional.mse_loss(guess, truth.values, reduction="none")
    else:
        error = 2 * functional.huber_loss(guess, truth.values, reduction="none", delta=huber)
    return _mean(error * truth.values_mask)


def _cat(said: Tensor, truth: Truth, channels: Channels) -> Tensor:
    total = said.new_zeros(len(said))
    for place, logits in enumerate(channels.logits(said)):
        classes = truth.classes[:, place]
        # Weights by hand: the weighted mean of cross_entropy divides by the batch's weights, which
        # is no sum over samples.
        error = functional.cross_entropy(
            logits, classes.clamp_min(0), weight=channels.class_weight(place), reduction="none"
        )
        total = total + _mean((error * (classes >= 0)).unsqueeze(1))
    return total / max(1, truth.classes.shape[1])


def _canopy(said: Tensor, truth: Truth, channels: Channels) -> Tensor:
    if not channels.canopy:
        return said.new_zeros(len(said))
    present, amount = channels.amounts(said)
    above = truth.amounts > 0
    error = functional.binary_cross_entropy_with_logits(
        present, above.to(said.dtype), reduction="none"
    )
    return _mean((error + (amount - truth.amounts).square() * above) * truth.amounts_mask)
