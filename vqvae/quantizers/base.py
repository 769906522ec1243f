"""What the model asks of a residual quantizer: each level encodes what the levels before left over.

Vectors go straight through for gradients. What a training step saw is kept outside the state
(`seen`) until `step` has used it: a checkpoint after the step needs none of it. With several ranks
`step` sums over them and is a collective call: all ranks make it, once an optimizer step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqvae.quantizers.codebook import perplexity

__all__ = ["Quantized", "Quantizer", "gather_vectors", "sum_over_ranks"]


class Quantized(NamedTuple):
    """What a quantizer makes of N vectors.

    Parameters
    ----------
    vectors
        float32 [N, D] with straight-through gradient.
    codes
        int64 [N, L].
    commit
        float32 [N], mean squared distance of the encoder's vectors from their
        codes, summed over levels; 0 for FSQ.
    """

    vectors: Tensor
    codes: Tensor
    commit: Tensor


class Quantizer(nn.Module):
    """Base of both kinds of quantizer.

    Parameters
    ----------
    size
        K, codes a level.
    dim
        D, numbers a vector.
    levels
        L, residual levels.
    """

    def __init__(self, size: int, dim: int, levels: int) -> None:
        super().__init__()
        self.size, self.dim, self.levels = size, dim, levels
        # A list and not a buffer: what a step saw is used up before a checkpoint is written, and
        # would only make it larger.
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.epoch_count: Tensor
        self.epoch: Tensor
        # Buffers, so that a run resumed in the middle of an epoch still reports the usage of all of
        # it.
        self.register_buffer("epoch_count", torch.zeros(levels, size, dtype=torch.int64))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def forward(self, vectors: Tensor, keep: Tensor, depth: Tensor | None = None) -> Quantized:
        """Quantize vectors.

        Parameters
        ----------
        vectors
            float32 [N, D].
        keep
            bool [N], False for vectors that must not count in any statistic.
        depth
            int64 [N] in 1..L, how many levels each vector is decoded from; None
            for all.
        """
        raise NotImplementedError

    def encode(self, vectors: Tensor) -> Tensor:
        """Return the codes of vectors: float32 [N, D] to int64 [N, L]."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Return vectors from the first l levels' codes: int64 [N, l] to float32 [N, D]."""
        raise NotImplementedError

    def tables(self) -> list[Tensor]:
        """Return what each code of each level adds, float32 [K, D] a level."""
        raise NotImplementedError

    def measured(self, vectors: Tensor) -> Tensor:
        """Return vectors [N, D] in the space of `tables`, which `decode` approximates."""
        return vectors

    def step(self, step: int, epoch: int) -> dict[str, float]:
        """End an optimizer step: update what follows the data.

        Parameters
        ----------
        step, epoch
            Of the run so far.

        Returns
        -------
        dict
            Figures of the step over all ranks. pplx: perplexity of the first
            level; pplx_<l>: of level l; log2_tokens: log2 of the vectors it was
            counted over; usage: share of the first level's codes used in this
            epoch so far; dead: codes replaced.
        """
        counted = self._counted(step)
        if int(self.epoch) != epoch:
            self.epoch_count.zero_()
            self.epoch.fill_(epoch)
        self.epoch_count += counted.long()
        self.seen = []

        first, *others = found = perplexity(counted).tolist()
        tokens = int(counted[0].sum())
        figures = {
            "pplx": first,
            # Beside the perplexity, because it cannot exceed the number of tokens that it is
            # counted over.
            "log2_tokens": math.log2(max(1, tokens)),
            "usage": float((self.epoch_count[0] > 0).float().mean()),
        }
        figures |= {f"pplx_{level}": value for level, value in enumerate(others, 2)}
        return figures | self._repair(found, tokens)

    def _counted(self, step: int) -> Tensor:
        """Return how often each code was used, [L, K] over all ranks; codebooks move here."""
        codes = torch.cat([codes for _, codes in self.seen])
        counts = [
            torch.bincount(codes[:, level], minlength=self.size) for level in range(self.levels)
        ]
        # Counts are summed before the perplexity is taken: over the tokens of one rank it is lower.
        return sum_over_ranks(torch.stack(counts))

    def _repair(self, found: list[float], tokens: int) -> dict[str, float]:
        """Restart what collapsed; return figures of the repair."""
        return {}


def _several_ranks() -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return bool(torch.distributed.get_world_size() > 1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, in place."""
    if _several_ranks():
        torch.distributed.all_reduce(values)
    return values


def gather_vectors(vectors: Tensor) -> Tensor:
    """Return the vectors [N, D] of all ranks, one rank after the other; N may differ."""
    if not _several_ranks():
        return vectors

    count = torch.distributed.get_world_size()
    sizes = torch.zeros(count, dtype=torch.int64, device=vectors.device)
    sizes[torch.distributed.get_rank()] = len(vectors)
    torch.distributed.all_reduce(sizes)

    # all_gather needs one shape on all ranks.
    padded = vectors.new_zeros((int(sizes.max()), vectors.shape[1]))
    padded[: len(vectors)] = vectors
    parts = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])
