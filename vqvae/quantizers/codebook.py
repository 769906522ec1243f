"""A codebook that follows what it encodes: exponential moving averages instead of gradients (van
den Oord 2017, appendix A.1).

Invariants: `collect` only adds up what one step saw, `step` alone changes the codebook, once an
optimizer step and from sums over all ranks and accumulated batches, so that these give what one big
batch gives. Before its k-means start a codebook lets vectors pass as they are. All that `step`
draws follows from (seed, step). Distances are taken ROWS vectors at a time and sums by index:
nothing of size tokens x codes is ever held whole. Given up: exact resume on a GPU, where index sums
have no fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Codebook", "CodebookRules", "k_means", "nearest", "perplexity"]

ROWS = 8192
EPSILON = 1e-5
K_MEANS_ROUNDS = 10
REPLACE_EVERY = 10


@dataclass(frozen=True, slots=True)
class CodebookRules:
    """decay of the averages; a code is dead when its average count is under dead_share of the mean;
    a codebook has collapsed when its perplexity stays under collapse_share of what is possible
    (codes, or tokens of the step) for collapse_steps steps; start_step: the optimizer step whose
    tokens start it by k-means."""

    decay: float = 0.99
    dead_share: float = 0.1
    collapse_share: float = 0.1
    collapse_steps: int = 20
    start_step: int = 0
    seed: int = 0


class Codebook(nn.Module):
    """K codes of D numbers, float32.

    Its state is copied, not averaged, into a running average of weights: codes are replaced.
    """

    copied_by_average = True

    def __init__(self, size: int, dim: int, rules: CodebookRules, level: int = 0) -> None:
        super().__init__()
        self.size, self.dim, self.rules, self.level = size, dim, rules, level
        self.codes: Tensor
        self.count: Tensor
        self.total: Tensor
        self.started: Tensor
        self.low_steps: Tensor
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros(size))
        self.register_buffer("total", torch.zeros(size, dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("low_steps", torch.zeros((), dtype=torch.int64))

    def nearest(self, vectors: Tensor) -> Tensor:
        """vectors: float32 [N, D]; the number of each one's nearest code, int64 [N]."""
        return nearest(vectors, self.codes)

    def decode(self, numbers: Tensor) -> Tensor:
        """numbers: int64 [N] in 0..K-1; float32 [N, D]."""
        return self.codes[numbers]

    def sums(self, vectors: Tensor, numbers: Tensor) -> Tensor:
        """Count and sum of the vectors of each code: float32 [K, 1 + D]."""
        count = torch.bincount(numbers, minlength=self.size).to(vectors.dtype).unsqueeze(1)
        return torch.cat(
            [count, torch.zeros_like(self.codes).index_add_(0, numbers, vectors)], dim=1
        )

    def start(self, vectors: Tensor, step: int) -> None:
        """Codes, counts and sums from k-means over a step's vectors, float32 [N, D] of all ranks.

        Without vectors it waits.
        """
        if len(vectors) == 0:
            return
        codes = k_means(vectors, self.size, self._generator(step))
        counted = self.sums(vectors, nearest(vectors, codes))
        self.codes.copy_(codes)
        # An empty cluster keeps its code with a little weight; it is replaced soon unless vectors
        # come.
        empty = counted[:, :1] == 0
        self.count.copy_(torch.where(empty, self.rules.dead_share, counted[:, :1]).squeeze(1))
        self.total.copy_(torch.where(empty, self.rules.dead_share * codes, counted[:, 1:]))
        self.started.fill_(True)
        self.low_steps.zero_()

    def update(self, counted: Tensor) -> None:
        """One step of the moving averages. counted: float32 [K, 1 + D] of a whole step, as `sums`
        gives it.

        Laplace smoothing keeps the codes of empty clusters where they are (as in Sonnet's
        VectorQuantizerEMA).
        """
        keep = self.rules.decay
        self.count.lerp_(counted[:, 0], 1 - keep)
        self.total.lerp_(counted[:, 1:], 1 - keep)
        whole = self.count.sum()
        smooth = (self.count + EPSILON) / (whole + self.size * EPSILON) * whole
        self.codes.copy_(self.total / smooth.clamp_min(EPSILON).unsqueeze(1))

    def replace_dead(self, vectors: Tensor, step: int) -> int:
        """Move dead codes onto vectors of the step, float32 [N, D] of all ranks, with fresh
        averages; how many were moved.
        """
        mean = self.count.mean()
        dead = torch.nonzero(self.count < self.rules.dead_share * mean).squeeze(1)
        dead = dead[: len(vectors)]
        if len(dead):
            chosen = vectors[
                torch.randperm(len(vectors), generator=self._generator(step))[: len(dead)].to(
                    vectors.device
                )
            ]
            self.codes[dead] = chosen
            self.count[dead] = mean
            self.total[dead] = chosen * mean
        return len(dead)

    def notice_collapse(self, found: float, tokens: int) -> bool:
        """Count a step of perplexity `found` over `tokens` vectors; true when it was one too many.

        The codebook then starts anew.
        """
        low = found < self.rules.collapse_share * min(self.size, max(1, tokens))
        self.low_steps.copy_((self.low_steps + 1) * int(low))
        if int(self.low_steps) < self.rules.collapse_steps:
            return False
        self.started.fill_(False)
        return True

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.rules.seed * 1_000_003 + step) * 64 + self.level)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """The row of codes [K, D] nearest (Euclid) to each of vectors [N, D]: int64 [N].

    Ties go to the lower number.
    """
    half_norm = codes.square().sum(dim=1) / 2
    return torch.cat(
        [
            torch.addmm(half_norm, part, codes.T, alpha=-1).argmin(dim=1)
            for part in vectors.split(ROWS)
        ]
        or [half_norm[:0].long()]
    )


def k_means(vectors: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """float32 [size, D]: Lloyd's rounds from drawn vectors.

    Clusters left empty move to drawn vectors. Fewer vectors: some repeat.
    """
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    codes = vectors[order.repeat(-(-size // len(vectors)))[:size]].clone()
    for _ in range(K_MEANS_ROUNDS):
        numbers = nearest(vectors, codes)
        count = torch.bincount(numbers, minlength=size).unsqueeze(1)
        total = torch.zeros_like(codes).index_add_(0, numbers, vectors)
        drawn = vectors[
            torch.randint(len(vectors), (size,), generator=generator).to(vectors.device)
        ]
        codes = torch.where(count > 0, total / count.clamp_min(1), drawn)
    return codes


def perplexity(count: Tensor) -> Tensor:
    """exp(entropy in nats) of counts [..., K], float64 [...].

    How many codes in even use would be as varied. 1 when all are 0.
    """
    share = count.double() / count.double().sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(dim=-1).exp()
