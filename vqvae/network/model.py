"""The autoencoder of cube blocks: 3D convolutions over (time, y, x), with features as channels.

    data, valid [B, T, Y, X, F]
        -> space to depth     [B, width, T/p, Y/p, X/p]
        -> residual blocks, squeezed to the latent grid
    latent      [B, D, t, y, x]
        -> quantizer
    codes       [B, L, t, y, x]
        -> residual blocks
        -> depth to space
    outputs     [B, outputs, T, Y, X]

The stem folds a patch of voxels into channels, so that most layers run on few, wide positions: on a
CPU four times as fast as at full resolution. Blocks are encoded one by one. A block can therefore
be decoded alone, and the price is that it knows nothing of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqvae.network.channels import Channels
from vqvae.network.layers import Residual, Triple, depth_to_space, divide, space_to_depth
from vqvae.quantizers.codebook import CodebookRules
from vqvae.quantizers.quantizer import make_quantizer
from warehouse.errors import TrainingError
from warehouse.layouts.features import Feature

__all__ = ["SCALING", "VQVAE", "Reconstruction", "Shape"]

EMBEDDING = 4

# To be changed whenever `Channels` changes what a number stands for.
SCALING = "range"
"""How continuous features are scaled, noted in checkpoints: weights of another scaling would decode
to wrong values without any error."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the shapes of the weights.

    Parameters
    ----------
    block
        Size of a sample, (time, y, x) in voxels.
    stride
        Voxels a latent position, a divisor of `block`.
    patch
        Voxels that the stem folds, a divisor of `stride`.
    width
        Channels, a multiple of 8.
    depth
        Residual blocks on each side.
    quantizer
        "ema" or "fsq".
    codebook_size, code_dim, levels
        K, D and L of the quantizer; D of FSQ follows from K.
    """

    block: Triple
    stride: Triple = (5, 4, 4)
    patch: Triple = (5, 4, 4)
    width: int = 192
    depth: int = 4
    quantizer: str = "ema"
    codebook_size: int = 512
    code_dim: int = 16
    levels: int = 4

    @property
    def grid(self) -> Triple:
        """Latent positions (t, y, x) of a sample."""
        return divide(self.block, self.stride)

    def check(self) -> None:
        """Check that the strides divide the block, and the patch the strides.

        Raises
        ------
        TrainingError
            They do not.
        """
        for name, size, total in (
            ("vqvae.stride", self.stride, self.block),
            ("vqvae.patch", self.patch, self.stride),
        ):
            if any(every % step for every, step in zip(total, size, strict=True)):
                raise TrainingError(
                    "these strides do not fit",
                    where=name,
                    expected=f"divisors of {list(total)} (time, y, x)",
                    found=list(size),
                    remedy=f"give another --{name}",
                )


class Reconstruction(NamedTuple):
    """What the model makes of a batch.

    Parameters
    ----------
    outputs
        float [B, outputs, T, Y, X]; `Channels` says which channel is what.
    codes
        int64 [B, L, t, y, x].
    commit
        float32 [B], the mean over latent positions of the quantizer's
        commitment.
    """

    outputs: Tensor
    codes: Tensor
    commit: Tensor


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder for one feature table and one block shape.

    Parameters
    ----------
    features
        The cube's features, with training statistics.
    shape
        Of block and network.
    rules
        Of the codebooks; None for the defaults, where they will not move.

    Notes
    -----
    VQ-VAE as in van den Oord 2017 (arXiv:1711.00937), with residual levels of
    codebooks (Juang, Gray 1982) instead of one.
    """

    def __init__(
        self, features: Sequence[Feature], shape: Shape, rules: CodebookRules | None = None
    ) -> None:
        super().__init__()
        shape.check()
        self.shape, self.channels = shape, Channels(features)
        self.inner = divide(shape.stride, shape.patch)
        table, width = self.channels, shape.width
        fine = divide(shape.block, shape.patch)
        patch_voxels, inner_positions = math.prod(shape.patch), math.prod(self.inner)

        self.quantizer = make_quantizer(
            shape.quantizer,
            shape.codebook_size,
            shape.code_dim,
            shape.levels,
            rules or CodebookRules(),
        )
        dim = self.quantizer.dim

        # One more class than declared, for "not valid".
        self.embed = nn.ModuleList(
            nn.Embedding(count + 1, EMBEDDING) for count in table.class_counts
        )
        incoming = (
            len(table.continuous)
            + 2 * len(table.canopy)
            + EMBEDDING * len(table.categorical)
            + len(table.features)
        )
        self.stem = nn.Conv3d(incoming * patch_voxels, width, 1)
        self.encoder = nn.Sequential(*(Residual(width, fine) for _ in range(shape.depth)))
        self.squeeze = nn.Conv3d(width * inner_positions, dim, 1)

        self.spread = nn.Conv3d(dim, width * inner_positions, 1)
        self.decoder = nn.Sequential(*(Residual(width, fine) for _ in range(shape.depth)))
        # A learned offset for each position; the attribute's name is part of every checkpoint.
        self.place = nn.Parameter(torch.zeros(1, width, *fine))
        self.head = nn.Conv3d(width, table.outputs * patch_voxels, 1)
        # The first reconstruction is near the mean.
        with torch.no_grad():
            self.head.weight.mul_(0.1)

    def forward(
        self, data: Tensor, valid: Tensor, keep: Tensor | None = None, depth: Tensor | None = None
    ) -> Reconstruction:
        """Encode and decode a batch.

        Parameters
        ----------
        data
            float32 [B, T, Y, X, F]; NaN or anything where not valid.
        valid
            bool, the same shape.
        keep
            bool [B], samples whose codes count in the codebooks' statistics;
            None for all.
        depth
            int64 [B], how many residual levels each sample is decoded from;
            None for all.
        """
        latent = self.latent(data, valid)
        vectors, grid = latent.movedim(1, -1).reshape(-1, latent.shape[1]), latent.shape[2:]
        positions = math.prod(grid)

        # A latent position over nothing but missing voxels tells the codebook nothing.
        counts = self._seen(valid)
        if keep is not None:
            counts = counts & keep.repeat_interleave(positions)
        depths = None if depth is None else depth.repeat_interleave(positions)
        found = self.quantizer(vectors, counts, depths)

        outputs = self.decoded(found.vectors.reshape(len(data), *grid, -1).movedim(-1, 1))
        codes = found.codes.reshape(len(data), *grid, -1).movedim(-1, 1)
        commit = (found.commit * counts).reshape(len(data), -1).mean(dim=1)
        return Reconstruction(outputs, codes, commit)

    def latent(self, data: Tensor, valid: Tensor) -> Tensor:
        """Return the latent vectors of blocks before quantization, float32 [B, D, t, y, x]."""
        folded = space_to_depth(self.stacked(data, valid), self.shape.patch)
        fine = self.encoder(self.stem(folded))
        latent: Tensor = self.squeeze(space_to_depth(fine, self.inner))
        return latent.float()

    def stacked(self, data: Tensor, valid: Tensor) -> Tensor:
        """Return what the stem sees, [B, channels, T, Y, X].

        The numbers come first (continuous, then amounts), which `linear_start` relies
        on; then flags, classes and masks.
        """
        truth = self.channels.truth(data, valid)
        embedded = [
            table(truth.classes[:, number] + 1).movedim(-1, 1)
            for number, table in enumerate(self.embed)
        ]
        positive = (truth.amounts > 0).to(data.dtype)
        mask = valid.movedim(-1, 1).to(data.dtype)
        return torch.cat([truth.values, truth.amounts, positive, *embedded, mask], dim=1)

    def decoded(self, vectors: Tensor) -> Tensor:
        """Return outputs [B, outputs, T, Y, X] of vectors float32 [B, D, t, y, x]."""
        fine = depth_to_space(self.spread(vectors), self.inner) + self.place
        return depth_to_space(self.head(self.decoder(fine)), self.shape.patch)

    def encode(self, data: Tensor, valid: Tensor) -> Tensor:
        """Return the nearest codes of blocks, int64 [B, L, t, y, x]."""
        latent = self.latent(data, valid)
        codes = self.quantizer.encode(latent.movedim(1, -1).reshape(-1, latent.shape[1]))
        return codes.reshape(len(data), *latent.shape[2:], -1).movedim(-1, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes.

        Parameters
        ----------
        codes
            int64 [B, l, t, y, x], the first l of the L levels.

        Returns
        -------
        Tensor
            float32 [B, T, Y, X, F] in physical units and class codes.
        """
        flat = codes.movedim(1, -1).reshape(-1, codes.shape[1])
        vectors = self.quantizer.decode(flat).reshape(len(codes), *codes.shape[2:], -1)
        return self.channels.physical(self.decoded(vectors.movedim(-1, 1)))

    def _seen(self, valid: Tensor) -> Tensor:
        """bool [B * t * y * x]: latent positions with a valid voxel under them."""
        known = valid.any(dim=-1).unsqueeze(1)
        return space_to_depth(known, self.shape.stride).any(dim=1).reshape(-1)

    def describe(self) -> dict[str, Any]:
        """Return JSON from which `restore_vqvae` builds the same model."""
        shape = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.shape).items()
        }
        return {
            "kind": "vqvae",
            "scaling": SCALING,
            **shape,
            "features": [feature.to_json() for feature in self.channels.features],
        }
