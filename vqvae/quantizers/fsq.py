"""Finite scalar quantization: a fixed grid instead of a codebook, so that nothing can collapse.

Level 0 is that of Mentzer 2023 (arXiv:2309.15505): each number is bounded by tanh and rounded to
one of its levels. The levels above refine what is left of the bounded number: each divides the cell
of the level before into as many parts. Gradients pass the rounding unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqvae.quantizers.base import Quantized, Quantizer
from warehouse.errors import ConfigError

__all__ = ["FsqQuantizer", "Grid", "grid_levels"]

SLACK = 1e-3
"""How far the bound lies beyond the outer levels, which tanh alone never reaches (the paper)."""


def grid_levels(size: int) -> tuple[int, ...]:
    """Return levels a dimension, 4 to 8 each, whose product is `size`, the largest first.

    Raises
    ------
    ConfigError
        There are none.
    """

    def split(rest: int, most: int) -> tuple[int, ...] | None:
        if rest == 1:
            return ()
        for level in range(min(most, rest), 3, -1):
            if rest % level:
                continue
            others = split(rest // level, level)
            if others is not None:
                return (level, *others)
        return None

    found = split(size, 8)
    if not found:
        raise ConfigError(
            "this codebook_size is no grid for fsq",
            where="vqvae.codebook_size",
            expected="a product of numbers from 4 to 8",
            found=size,
            remedy="use 512 (8 x 8 x 8), 256 or 1024, or quantizer ema",
        )
    return found


class Grid(nn.Module):
    """The implicit codebook of FSQ.

    Parameters
    ----------
    levels
        Levels of each of the D numbers of a vector.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels: Tensor
        self.basis: Tensor
        count = torch.tensor(levels)
        self.size, self.dim = int(count.prod()), len(levels)
        basis = torch.cumprod(torch.tensor([1, *levels[:-1]]), 0)
        # Not in checkpoints: they follow from the codebook's size.
        self.register_buffer("levels", count, persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def bound(self, vectors: Tensor) -> Tensor:
        """Bound vectors to the grid.

        Parameters
        ----------
        vectors
            float32 [N, D], any values.

        Returns
        -------
        Tensor
            The same shape, values that round to whole numbers; 0 is the middle
            level. Equation 2 of the paper, with its shift for even levels.
        """
        half = (self.levels - 1) * (1 + SLACK) / 2
        # An even number of levels has no middle one: without the shift by half a level, rounding
        # would reach one level more below than above (equation 2).
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (vectors + (offset / half).atanh()).tanh() * half - offset

    def split(self, bounded: Tensor, depth: int) -> Tensor:
        """Return the codes of bounded vectors.

        Parameters
        ----------
        bounded
            float32 [N, D] from `bound`.
        depth
            How many residual levels.

        Returns
        -------
        Tensor
            int64 [N, depth].
        """
        middle, rest, codes = self.levels // 2, bounded, []
        for level in range(depth):
            if level == 0:
                digit = (rest.round() + middle).long()
                rest = rest - rest.round()
            else:
                part = (rest + 0.5) * self.levels
                # A value on the upper border of its cell would get one digit too many.
                digit = part.floor().long().clamp(min=0).minimum(self.levels - 1)
                rest = part - digit - 0.5
            codes.append((digit * self.basis).sum(dim=1))
        return torch.stack(codes, dim=1)

    def parts(self, codes: Tensor) -> list[Tensor]:
        """Return what each level adds, in units of level 0's grid over [-1, 1].

        Parameters
        ----------
        codes
            int64 [N, L].

        Returns
        -------
        list of Tensor
            float32 [N, D] a level.
        """
        half = (self.levels // 2).float()
        cell: float | Tensor = 1.0
        parts = []
        for level in range(codes.shape[1]):
            digit = (codes[:, level, None] // self.basis) % self.levels
            if level == 0:
                parts.append((digit - self.levels // 2) / half)
            else:
                # The middle of the part, which is at most half a part away from any value in it.
                parts.append(((digit + 0.5) / self.levels - 0.5) * cell / half)
                cell = cell / self.levels
        return parts


class FsqQuantizer(Quantizer):
    """FSQ and its refinements: the control that cannot collapse.

    Parameters
    ----------
    size
        K; the grid, and with it D, follows from it (`grid_levels`).
    levels
        L.
    """

    def __init__(self, size: int, levels: int) -> None:
        grid = Grid(grid_levels(size))
        super().__init__(size, grid.dim, levels)
        self.grid = grid

    def forward(self, vectors: Tensor, keep: Tensor, depth: Tensor | None = None) -> Quantized:
        """See `Quantizer`."""
        bounded = self.grid.bound(vectors)
        codes = self.grid.split(bounded.detach(), self.levels)

        total = torch.zeros_like(bounded)
        for level, part in enumerate(self.grid.parts(codes)):
            total = total + (part if depth is None else part * (depth > level).unsqueeze(1))

        if self.training:
            # Only codes are counted: there is no codebook to move.
            self.seen.append((vectors.detach()[:0], codes[keep]))
        smooth = bounded / (self.grid.levels // 2)
        straight_through = smooth + (total - smooth).detach()
        return Quantized(straight_through, codes, vectors.new_zeros(len(vectors)))

    def encode(self, vectors: Tensor) -> Tensor:
        """See `Quantizer`."""
        return self.grid.split(self.grid.bound(vectors), self.levels)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer`."""
        return torch.stack(self.grid.parts(codes)).sum(dim=0)

    def tables(self) -> list[Tensor]:
        """See `Quantizer`."""
        every = torch.arange(self.size, device=self.grid.levels.device)
        return self.grid.parts(every.unsqueeze(1).expand(-1, self.levels))

    def measured(self, vectors: Tensor) -> Tensor:
        """See `Quantizer`."""
        return self.grid.bound(vectors) / (self.grid.levels // 2)
