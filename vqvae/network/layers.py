"""The layers of the autoencoder, and the folding of voxels into channels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["Residual", "Triple", "depth_to_space", "divide", "space_to_depth"]

# Group and not batch normalisation: with statistics of a batch, a block's codes would depend on the
# blocks beside it, and it could not be decoded alone.
GROUPS = 8

Triple = tuple[int, int, int]
"""(time, y, x)."""


class Residual(nn.Module):
    """Two convolutions around an identity.

    Parameters
    ----------
    width
        Channels.
    grid
        Positions (t, y, x) of a training block. Where an axis has one position,
        its kernel is 1 wide: a wider one would see only padding.
    """

    def __init__(self, width: int, grid: Sequence[int]) -> None:
        super().__init__()
        # On an axis of one position a wider kernel would see only padding.
        t, y, x = (3 if size > 1 else 1 for size in grid)
        last = nn.Conv3d(width, width, 1)
        self.body = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Conv3d(width, width, (t, y, x), padding=(t // 2, y // 2, x // 2)),
            nn.SiLU(),
            last,
        )
        # Each block begins as the identity, which `linear_start` relies on.
        nn.init.zeros_(last.weight)
        if last.bias is not None:
            nn.init.zeros_(last.bias)

    def forward(self, value: Tensor) -> Tensor:
        """[B, width, t, y, x] to the same shape."""
        change: Tensor = self.body(value)
        return value + change


def divide(total: Triple, step: Triple) -> Triple:
    """Return total // step, axis by axis."""
    t, y, x = (size // part for size, part in zip(total, step, strict=True))
    return t, y, x


def space_to_depth(value: Tensor, patch: Triple) -> Tensor:
    """[B, C, T, Y, X] to [B, C * prod(patch), T/pt, Y/py, X/px]."""
    batch, channels, *size = value.shape
    pt, py, px = patch
    t, y, x = (total // part for total, part in zip(size, patch, strict=True))
    folded = value.reshape(batch, channels, t, pt, y, py, x, px).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return folded.reshape(batch, channels * pt * py * px, t, y, x)


def depth_to_space(value: Tensor, patch: Triple) -> Tensor:
    """Undo `space_to_depth`."""
    batch, channels, t, y, x = value.shape
    pt, py, px = patch
    split = value.reshape(batch, channels // (pt * py * px), pt, py, px, t, y, x)
    folded = split.permute(0, 1, 5, 2, 6, 3, 7, 4)
    return folded.reshape(batch, -1, t * pt, y * py, x * px)
