"""The loss terms of a reconstruction, one number a sample.

The terms are `cont`, `cat`, `canopy`, `vq`, and `total`, their weighted sum. Every valid voxel
weighs the same: a sample's term is the sum over its valid voxels divided by all its voxels, so that
sums over samples, batches and ranks are right whatever is missing where. A term whose kind of
feature the cube does not have is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from vqvae.network.channels import Channels, Truth
from vqvae.network.model import Reconstruction

__all__ = ["TERMS", "Weights", "loss_terms"]

TERMS = ("cont", "cat", "canopy", "vq", "total")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of the terms in `total`.

    Parameters
    ----------
    cat, canopy
        Of these terms; `cont` weighs 1.
    beta
        Of the commitment to the codes (van den Oord 2017, equation 3). Codebooks
        follow by moving averages, so that the equation's second term is absent.
    huber
        Scaled error (network/channels.py) from which the squared error of a
        continuous feature becomes linear; None for never.
    """

    cat: float = 0.1
    canopy: float = 0.2
    beta: float = 0.25
    huber: float | None = None


def loss_terms(
    found: Reconstruction, truth: Truth, channels: Channels, weights: Weights
) -> dict[str, Tensor]:
    """Compute the loss of a batch.

    Parameters
    ----------
    found
        What the model made of it.
    truth
        What it should say, from `channels`.
    channels
        The feature table.
    weights
        Of the terms.

    Returns
    -------
    dict of str to Tensor
        float32 [B] for each of TERMS. cont: squared error of scaled values, or
        twice the Huber loss, mean over features. cat: cross-entropy in nats with
        inverse-frequency class weights. canopy: binary cross-entropy of being above
        zero, plus the squared error of log1p(amount) where it is. vq: weighted
        commitment.
    """
    # bf16 outputs would lose the small errors that training ends with.
    outputs = found.outputs.float()
    terms = {
        "cont": _cont(outputs, truth, weights.huber),
        "cat": _cat(outputs, truth, channels),
        "canopy": _canopy(outputs, truth, channels),
        "vq": weights.beta * found.commit,
    }
    total = terms["cont"] + weights.cat * terms["cat"]
    total = total + weights.canopy * terms["canopy"] + terms["vq"]
    return {**terms, "total": total}


def _mean(error: Tensor) -> Tensor:
    """[B, features, T, Y, X] with 0 where not valid, to [B]."""
    if not error.shape[1]:
        return error.new_zeros(len(error))
    return error.flatten(1).mean(dim=1)


def _cont(outputs: Tensor, truth: Truth, huber: float | None) -> Tensor:
    guess = outputs[:, : truth.values.shape[1]]
    if huber is None:
        error = functional.mse_loss(guess, truth.values, reduction="none")
    else:
        # Twice, so that small errors cost what they cost without it.
        error = 2 * functional.huber_loss(guess, truth.values, reduction="none", delta=huber)
    return _mean(error * truth.values_mask)


def _cat(outputs: Tensor, truth: Truth, channels: Channels) -> Tensor:
    total = outputs.new_zeros(len(outputs))
    for position, logits in enumerate(channels.logits(outputs)):
        classes = truth.classes[:, position]
        # Reduced by hand: the weighted mean of cross_entropy divides by the batch's weights, which
        # is not a sum over samples.
        error = functional.cross_entropy(
            logits,
            classes.clamp_min(0),
            weight=channels.class_weight(position),
            reduction="none",
        )
        total = total + _mean((error * (classes >= 0)).unsqueeze(1))
    return total / max(1, truth.classes.shape[1])


def _canopy(outputs: Tensor, truth: Truth, channels: Channels) -> Tensor:
    if not channels.canopy:
        return outputs.new_zeros(len(outputs))

    present, amount = channels.amounts(outputs)
    above = truth.amounts > 0
    error = functional.binary_cross_entropy_with_logits(
        present, above.to(outputs.dtype), reduction="none"
    )
    # Most voxels are zero; how much there is counts only where there is any.
    squared = (amount - truth.amounts).square() * above
    return _mean((error + squared) * truth.amounts_mask)
