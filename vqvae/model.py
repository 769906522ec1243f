"""The autoencoder of cube blocks: 3D convolutions over (time, y, x) on a coarse grid, features as
channels.

    data, valid [B, T, Y, X, F] --space to depth--> [B, width, T/p, Y/p, X/p] --residual blocks-->
    latent [B, D, t, y, x]
    --quantizer--> codes [B, L, t, y, x] --> residual blocks --depth to space--> said [B, outputs,
    T, Y, X]

The stem folds a patch of voxels into channels, so most layers run on few, wide positions: on a CPU
four times as fast as at full resolution. Blocks are encoded one by one: a block decodes alone, and
the price is that it knows nothing of its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqvae.channels import Channels
from vqvae.quantizers.codebook import CodebookRules
from vqvae.quantizers.quantizer import make_quantizer
from warehouse.errors import TrainingError
from warehouse.layouts.cube_geometry import Feature

__all__ = ["SCALING", "VQVAE", "Reconstruction", "Shape"]

EMBEDDING = 4
GROUPS = 8
SCALING = "range"
"""Of continuous features, in checkpoints.

Weights of another scaling would decode to wrong values without any error.
"""
Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the weights. block: voxels (time, y, x) of a sample; stride: voxels a latent
    position; patch: voxels the stem folds, a divisor of stride; width: channels; depth: residual
    blocks on each side at the patch grid."""

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
        t, y, x = (size // step for size, step in zip(self.block, self.stride, strict=True))
        return t, y, x

    def check(self) -> None:
        """Raises TrainingError when the strides do not fit the block, or the patch the strides."""
        for name, part, whole in (
            ("vqvae.stride", self.stride, self.block),
            ("vqvae.patch", self.patch, self.stride),
        ):
            if any(size % step for size, step in zip(whole, part, strict=True)):
                raise TrainingError(
                    "these strides do not fit",
                    where=name,
                    expected=f"divisors of {list(whole)} (time, y, x)",
                    found=list(part),
                    remedy=f"give another --{name}",
                )


class Reconstruction(NamedTuple):
    """said: float [B, outputs, T, Y, X] (channels.py says which is what); codes: int64 [B, L, t, y,
    x]; commit: float32 [B], the mean over latent positions of the quantizer's commitment."""

    said: Tensor
    codes: Tensor
    commit: Tensor


class Residual(nn.Module):
    def __init__(self, width: int, grid: Sequence[int]) -> None:
        super().__init__()
        kernel = [3 if size > 1 else 1 for size in grid]
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv3d(width, width, tuple(kernel), padding=tuple(size // 2 for size in kernel)),
            nn.SiLU(),
            nn.Conv3d(width, width, 1),
        )
        # Each block begins as the identity.
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.body(value)


class VQVAE(nn.Module):
    """Encoder, quantizer, decoder for one feature table and one block shape."""

    def __init__(
        self, features: Sequence[Feature], shape: Shape, rules: CodebookRules | None = None
    ) -> None:
        super().__init__()
        shape.check()
        self.shape, self.channels = shape, Channels(features)
        table = self.channels
        patch, inner = (
            shape.patch,
            tuple(step // size for step, size in zip(shape.stride, shape.patch, strict=True)),
        )
        self.inner: Triple = inner  # type: ignore[assignment]
        fine = [size // step for size, step in zip(shape.block, patch, strict=True)]
        self.quantizer = make_quantizer(
            shape.quantizer,
            shape.codebook_size,
            shape.code_dim,
            shape.levels,
            rules or CodebookRules(),
        )
        dim, width = self.quantizer.dim, shape.width
        self.embed = nn.ModuleList(
            nn.Embedding(count + 1, EMBEDDING) for count in table.class_counts
        )
        incoming = (
            len(table.continuous)
            + 2 * len(table.canopy)
            + EMBEDDING * len(table.categorical)
            + len(table.features)
        )
        self.stem = nn.Conv3d(incoming * math.prod(patch), width, 1)
        self.encoder = nn.Sequential(*(Residual(width, fine) for _ in range(shape.depth)))
        self.squeeze = nn.Conv3d(width * math.prod(self.inner), dim, 1)
        self.spread = nn.Conv3d(dim, width * math.prod(self.inner), 1)
        self.decoder = nn.Sequential(*(Residual(width, fine) for _ in range(shape.depth)))
        self.place = nn.Parameter(torch.zeros(1, width, *fine))
        self.head = nn.Conv3d(width, table.outputs * math.prod(patch), 1)
        # The first reconstruction is near the mean.
        with torch.no_grad():
            self.head.weight.mul_(0.1)

    def forward(
        self, data: Tensor, valid: Tensor, keep: Tensor | None = None, depth: Tensor | None = None
    ) -> Reconstruction:
        """data: float32 [B, T, Y, X, F], NaN or anything where not valid; valid: bool; keep: bool
        [B], samples whose codes count in the codebook's statistics; depth: int64 [B], how many
        residual levels each sample is decoded from."""
        latent = self.latent(data, valid)
        vectors, grid = latent.movedim(1, -1).reshape(-1, latent.shape[1]), latent.shape[2:]
        each = math.prod(grid)
        # A latent position over nothing but missing voxels tells the codebook nothing.
        counts = (
            self._seen(valid) if keep is None else self._seen(valid) & keep.repeat_interleave(each)
        )
        found = self.quantizer(
            vectors, counts, None if depth is None else depth.repeat_interleave(each)
        )
        said = self.decoded(found.vectors.reshape(len(data), *grid, -1).movedim(-1, 1))
        codes = found.codes.reshape(len(data), *grid, -1).movedim(-1, 1)
        return Reconstruction(
            said, codes, (found.commit * counts).reshape(len(data), -1).mean(dim=1)
        )

    def latent(self, data: Tensor, valid: Tensor) -> Tensor:
        """float32 [B, D, t, y, x]."""
        fine = self.encoder(self.stem(space_to_depth(self._stacked(data, valid), self.shape.patch)))
        return self.squeeze(space_to_depth(fine, self.inner)).float()

    def _stacked(self, data: Tensor, valid: Tensor) -> Tensor:
        """What the stem sees, [B, channels, T, Y, X].

        The numbers first (continuous, then amounts), then flags, classes and masks.
        """
        truth = self.channels.truth(data, valid)
        embedded = [
            table(truth.classes[:, place] + 1).movedim(-1, 1)
            for place, table in enumerate(self.embed)
        ]
        positive = (truth.amounts > 0).to(data.dtype)
        mask = valid.movedim(-1, 1).to(data.dtype)
        return torch.cat([truth.values, truth.amounts, positive, *embedded, mask], dim=1)

    @torch.no_grad()
    def linear_start(self, data: Tensor, valid: Tensor) -> None:
        """Begin as principal component analysis of these blocks: float32 [B, T, Y, X, F] and bool.

        The latent is then the first D components of a position's voxels, scaled to variance 1 in
        the mean, and the residual blocks, which begin as the identity, learn the rest. From random
        weights the few strongest components hide the others from a quantised encoder for thousands
        of steps. The head begins at a tenth, near the mean of every feature.
        """
        numbers = len(self.channels.continuous) + len(self.channels.canopy)
        patch, inner = math.prod(self.shape.patch), math.prod(self.inner)
        if numbers == 0:
            return
        folded = space_to_depth(self._stacked(data, valid)[:, :numbers], self.shape.patch)
        mean, first = components(folded, min(self.shape.width // 2, numbers * patch))
        kept = first.shape[1]
        self.stem.weight[:kept] = 0
        self.stem.weight[:kept, : numbers * patch, 0, 0, 0] = first.T
        self.stem.bias[:kept] = -(mean @ first)
        fine = torch.einsum("bctyx,ck->bktyx", folded, first) - (mean @ first).view(1, -1, 1, 1, 1)
        latent = space_to_depth(fine, self.inner)
        middle, second = components(latent, min(self.quantizer.dim, kept * inner))
        spread = (
            torch.einsum("bctyx,ck->bktyx", latent, second).movedim(1, -1).flatten(0, -2).var(dim=0)
        )
        # FSQ bounds each number on its own; codebooks measure distances, which equal scales keep
        # those of the blocks.
        scale = (
            (spread if self.shape.quantizer == "fsq" else spread.mean().expand_as(spread))
            .clamp_min(1e-12)
            .sqrt()
        )
        dims = second.shape[1]
        self.squeeze.weight.zero_()
        self.squeeze.weight[:dims, : kept * inner, 0, 0, 0] = (second / scale).T
        self.squeeze.bias.zero_()
        self.squeeze.bias[:dims] = -(middle @ second) / scale
        self.spread.weight[: kept * inner] = 0
        self.spread.weight[: kept * inner, :dims, 0, 0, 0] = second * scale
        self.spread.bias[: kept * inner] = middle
        shown = len(self.channels.continuous) * patch
        self.head.weight[:shown] = 0
        self.head.weight[:shown, :kept, 0, 0, 0] = 0.1 * first[:shown]

    def decoded(self, vectors: Tensor) -> Tensor:
        """vectors: float32 [B, D, t, y, x]; said [B, outputs, T, Y, X]."""
        fine = depth_to_space(self.spread(vectors), self.inner) + self.place
        return depth_to_space(self.head(self.decoder(fine)), self.shape.patch)

    def encode(self, data: Tensor, valid: Tensor) -> Tensor:
        """Codes int64 [B, L, t, y, x]."""
        latent = self.latent(data, valid)
        codes = self.quantizer.encode(latent.movedim(1, -1).reshape(-1, latent.shape[1]))
        return codes.reshape(len(data), *latent.shape[2:], -1).movedim(-1, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes: int64 [B, l, t, y, x], the first l of the L levels.

        Data float32 [B, T, Y, X, F] in physical units and codes.
        """
        flat = codes.movedim(1, -1).reshape(-1, codes.shape[1])
        vectors = (
            self.quantizer.decode(flat).reshape(len(codes), *codes.shape[2:], -1).movedim(-1, 1)
        )
        return self.channels.physical(self.decoded(vectors))

    def _seen(self, valid: Tensor) -> Tensor:
        """bool [B * t * y * x]: latent positions with a valid voxel under them."""
        return (
            space_to_depth(valid.any(dim=-1).unsqueeze(1), self.shape.stride).any(dim=1).reshape(-1)
        )

    def describe(self) -> dict[str, Any]:
        """JSON that builds the same model again."""
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


def components(value: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [C] and the strongest `count` principal components [C, count] of value [B, C, ...] over
    all but its channels.
    """
    rows = value.movedim(1, -1).flatten(0, -2)
    mean = rows.mean(dim=0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    return mean, vectors.flip(1)[:, :count]


def space_to_depth(value: Tensor, patch: Triple) -> Tensor:
    """[B, C, T, Y, X] to [B, C * prod(patch), T/pt, Y/py, X/px]."""
    batch, channels, *size = value.shape
    pt, py, px = patch
    t, y, x = (whole // part for whole, part in zip(size, patch, strict=True))
    folded = value.reshape(batch, channels, t, pt, y, py, x, px).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return folded.reshape(batch, channels * pt * py * px, t, y, x)


def depth_to_space(value: Tensor, patch: Triple) -> Tensor:
    """The inverse of `space_to_depth`."""
    batch, channels, t, y, x = value.shape
    pt, py, px = patch
    folded = value.reshape(batch, channels // (pt * py * px), pt, py, px, t, y, x).permute(
        0, 1, 5, 2, 6, 3, 7, 4
    )
    return folded.reshape(batch, -1, t * pt, y * py, x * px)
