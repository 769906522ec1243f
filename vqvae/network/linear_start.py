"""The start of the model from the principal components of training blocks.

From random weights, the few strongest components hide the others from a quantized encoder for
thousands of steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqvae.network.layers import space_to_depth
from vqvae.network.model import VQVAE

__all__ = ["components", "linear_start"]


@torch.no_grad()
def linear_start(model: VQVAE, data: Tensor, valid: Tensor) -> None:
    """Set the weights to a principal component analysis of these blocks.

    The latent is then the first D components of a position's voxels, scaled to
    variance 1 in the mean, and the residual blocks, which begin as the identity,
    learn the rest. The head begins at a tenth, near the mean of every feature.

    Parameters
    ----------
    model
        Changed in place; its stem keeps half of its channels random.
    data, valid
        float32 and bool [B, T, Y, X, F].
    """
    channels, shape = model.channels, model.shape
    numbers = len(channels.continuous) + len(channels.canopy)
    patch, inner = math.prod(shape.patch), math.prod(model.inner)
    if numbers == 0:
        return

    # The stem takes the strongest components of a patch.
    folded = space_to_depth(model.stacked(data, valid)[:, :numbers], shape.patch)
    mean, first = components(folded, min(shape.width // 2, numbers * patch))
    kept = first.shape[1]
    _set_rows(model.stem, kept, numbers * patch, first.T, -(mean @ first))

    # The latent takes the strongest components of a latent position's patches.
    projected = torch.einsum("bctyx,ck->bktyx", folded, first)
    fine = projected - (mean @ first).view(1, -1, 1, 1, 1)
    latent = space_to_depth(fine, model.inner)
    middle, second = components(latent, min(model.quantizer.dim, kept * inner))
    dims = second.shape[1]
    scores = torch.einsum("bctyx,ck->bktyx", latent, second)
    scale = _latent_scale(scores, apart=shape.quantizer == "fsq")

    model.squeeze.weight.zero_()
    _bias(model.squeeze).zero_()
    to_latent = (second / scale).T
    _set_rows(model.squeeze, dims, kept * inner, to_latent, -(middle @ second) / scale)

    # The decoder undoes both.
    _set_rows(model.spread, kept * inner, dims, second * scale, middle)
    shown = len(channels.continuous) * patch
    model.head.weight[:shown] = 0
    model.head.weight[:shown, :kept, 0, 0, 0] = 0.1 * first[:shown]


def _latent_scale(scores: Tensor, *, apart: bool) -> Tensor:
    """Return the deviation [D] that each latent number of [B, D, t, y, x] is divided by."""
    variance = scores.movedim(1, -1).flatten(0, -2).var(dim=0)
    if not apart:
        # Codebooks measure distances, which equal scales keep those of the blocks. FSQ bounds each
        # number on its own.
        variance = variance.mean().expand_as(variance)
    return variance.clamp_min(1e-12).sqrt()


def components(value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the strongest principal components over all axes but the channels.

    Parameters
    ----------
    value
        float32 [B, C, ...].
    count
        How many.

    Returns
    -------
    tuple of Tensor
        Mean [C] and orthonormal directions [C, count], the strongest first.
    """
    rows = value.movedim(1, -1).flatten(0, -2)
    mean = rows.mean(dim=0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    return mean, vectors.flip(1)[:, :count]


def _bias(layer: nn.Conv3d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _set_rows(layer: nn.Conv3d, rows: int, columns: int, weight: Tensor, bias: Tensor) -> None:
    """Set the first outputs of a 1 x 1 x 1 convolution to a map of its first inputs alone."""
    layer.weight[:rows] = 0
    layer.weight[:rows, :columns, 0, 0, 0] = weight
    _bias(layer)[:rows] = bias
