"""Finite scalar quantisation (Mentzer 2023, arXiv:2309.15505): a fixed grid instead of a codebook,
so nothing can collapse.

Level 0 is the paper's: each number is bounded by tanh and rounded to one of its levels. Levels
above refine what is left of the bounded number: each divides the cell of the level before into as
many parts. Gradients pass the rounding unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from warehouse.errors import ConfigError

__all__ = ["Grid", "grid_levels"]

SLACK = 1e-3


def grid_levels(size: int) -> tuple[int, ...]:
    """Levels a dimension, 4 to 8 each, whose product is `size`, the largest first.

    Raises ConfigError when there are none.
    """

    def split(rest: int, most: int) -> tuple[int, ...] | None:
        if rest == 1:
            return ()
        for level in range(min(most, rest), 3, -1):
            if rest % level == 0 and (more := split(rest // level, level)) is not None:
                return (level, *more)
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
    """The implicit codebook of FSQ over D = len(levels) numbers."""

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.levels: Tensor
        self.basis: Tensor
        count = torch.tensor(levels)
        self.size, self.dim = int(count.prod()), len(levels)
        self.register_buffer("levels", count, persistent=False)
        self.register_buffer(
            "basis", torch.cumprod(torch.tensor([1, *levels[:-1]]), 0), persistent=False
        )

    def bound(self, vectors: Tensor) -> Tensor:
        """float32 [N, D] of any size to numbers that round to whole ones.

        0 is the middle level (the paper's equation, with its shift).
        """
        half = (self.levels - 1) * (1 + SLACK) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (vectors + (offset / half).atanh()).tanh() * half - offset

    def split(self, bounded: Tensor, depth: int) -> Tensor:
        """Codes int64 [N, depth] of bounded numbers [N, D]."""
        place, rest, codes = self.levels // 2, bounded, []
        for level in range(depth):
            if level == 0:
                digit = (rest.round() + place).long()
                rest = rest - rest.round()
            else:
                digit = (
                    ((rest + 0.5) * self.levels)
                    .floor()
                    .long()
                    .clamp(min=0)
                    .minimum(self.levels - 1)
                )
                rest = (rest + 0.5) * self.levels - digit - 0.5
            codes.append((digit * self.basis).sum(dim=1))
        return torch.stack(codes, dim=1)

    def parts(self, codes: Tensor) -> list[Tensor]:
        """codes int64 [N, L]: what each level adds, float32 [N, D] each.

        In the units of level 0's grid over [-1, 1].
        """
        half, cell, parts = (self.levels // 2).float(), 1.0, []
        for level in range(codes.shape[1]):
            digit = (codes[:, level, None] // self.basis) % self.levels
            if level == 0:
                parts.append((digit - self.levels // 2) / half)
            else:
                parts.append(((digit + 0.5) / self.levels - 0.5) * cell / half)
            cell = cell if level == 0 else cell / self.levels
        return parts
