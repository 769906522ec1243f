"""A codebook that follows what it encodes, by exponential moving averages instead of gradients.

Invariants: only `start`, `update` and `replace_dead` change the codes, once an optimizer step and
from sums over all ranks and accumulated batches, so that these give what one big batch gives. All
random choices follow from (seed, step, level). Distances are taken ROWS vectors at a time and sums
by index: nothing of size tokens x codes is ever in memory as a whole. Given up: exact resume on a
GPU, where index sums have no fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Codebook", "CodebookRules", "k_means", "nearest", "perplexity"]

# Distances of so many vectors at a time: a matrix of all tokens of a batch by all codes would be
# the largest tensor of a step.
ROWS = 8192
EPSILON = 1e-5
K_MEANS_ROUNDS = 10
REPLACE_EVERY = 10
"""Steps between replacements of dead codes: ranks exchange whole vectors for them."""


@dataclass(frozen=True, slots=True)
class CodebookRules:
    """How codebooks follow the encoder.

    Parameters
    ----------
    decay
        Of the moving averages, in (0, 1).
    dead_share
        A code is dead when its average count is under this share of the mean.
    collapse_share
        A codebook is collapsing while its perplexity is under this share of
        what is possible: the number of codes, or of the step's tokens.
    collapse_steps
        Steps in a row after which a collapsing codebook starts again.
    start_step
        The optimizer step whose tokens start the codebooks by k-means.
    seed
        Of all random choices.
    """

    decay: float = 0.99
    dead_share: float = 0.1
    collapse_share: float = 0.1
    collapse_steps: int = 20
    start_step: int = 0
    seed: int = 0


class Codebook(nn.Module):
    """K codes of D numbers, float32.

    Its state is copied, not averaged, into a running average of the weights:
    codes get replaced, and the mean of a code before and after is no code.

    Parameters
    ----------
    size, dim
        K and D.
    rules
        How it follows what it encodes.
    level
        Its residual level, which keeps the random choices of levels apart.

    Notes
    -----
    Moving averages as in van den Oord 2017 (arXiv:1711.00937), appendix A.1,
    as used for the hierarchies of Razavi 2019 (arXiv:1906.00446).
    """

    def __init__(self, size: int, dim: int, rules: CodebookRules, level: int = 0) -> None:
        super().__init__()
        self.size, self.dim, self.rules, self.level = size, dim, rules, level
        self.codes: Tensor
        self.count: Tensor
        self.total: Tensor
        self.started: Tensor
        self.low_steps: Tensor
        # Buffers and not parameters: the optimizer must neither move nor decay them.
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("count", torch.zeros(size))
        self.register_buffer("total", torch.zeros(size, dim))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("low_steps", torch.zeros((), dtype=torch.int64))

    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the nearest code of each vector: float32 [N, D] to int64 [N]."""
        return nearest(vectors, self.codes)

    def decode(self, numbers: Tensor) -> Tensor:
        """Return the codes of numbers in 0..K-1: int64 [N] to float32 [N, D]."""
        return self.codes[numbers]

    def sums(self, vectors: Tensor, numbers: Tensor) -> Tensor:
        """Return count and sum of the vectors of each code.

        Parameters
        ----------
        vectors
            float32 [N, D].
        numbers
            int64 [N], the code of each vector.

        Returns
        -------
        Tensor
            float32 [K, 1 + D], the count first. Such sums of batches and ranks
            may be added.
        """
        count = torch.bincount(numbers, minlength=self.size).to(vectors.dtype)
        total = torch.zeros_like(self.codes).index_add_(0, numbers, vectors)
        return torch.cat([count.unsqueeze(1), total], dim=1)

    def start(self, vectors: Tensor, step: int) -> None:
        """Set codes, counts and sums from k-means over the vectors of a step.

        Parameters
        ----------
        vectors
            float32 [N, D] of all ranks. Without vectors the codebook waits for
            the next step.
        step
            The optimizer step.
        """
        if len(vectors) == 0:
            return

        codes = k_means(vectors, self.size, self._generator(step))
        counted = self.sums(vectors, nearest(vectors, codes))
        self.codes.copy_(codes)

        # An empty cluster keeps its code with a little weight, so that it is replaced soon unless
        # vectors come.
        empty = counted[:, :1] == 0
        little = self.rules.dead_share
        self.count.copy_(torch.where(empty, little, counted[:, :1]).squeeze(1))
        self.total.copy_(torch.where(empty, little * codes, counted[:, 1:]))
        self.started.fill_(True)
        self.low_steps.zero_()

    def update(self, counted: Tensor) -> None:
        """Move the averages by one step.

        Parameters
        ----------
        counted
            float32 [K, 1 + D], the `sums` of the whole step.

        Notes
        -----
        Laplace smoothing of the counts keeps the codes of empty clusters where
        they are, as in Sonnet's VectorQuantizerEMA.
        """
        weight = 1 - self.rules.decay
        self.count.lerp_(counted[:, 0], weight)
        self.total.lerp_(counted[:, 1:], weight)

        tokens = self.count.sum()
        smooth = (self.count + EPSILON) / (tokens + self.size * EPSILON) * tokens
        self.codes.copy_(self.total / smooth.clamp_min(EPSILON).unsqueeze(1))

    def replace_dead(self, vectors: Tensor, step: int) -> int:
        """Move dead codes onto vectors of the step, with fresh averages.

        Parameters
        ----------
        vectors
            float32 [N, D] of all ranks.
        step
            The optimizer step.

        Returns
        -------
        int
            How many codes were moved, at most N.
        """
        mean = self.count.mean()
        dead = torch.nonzero(self.count < self.rules.dead_share * mean).squeeze(1)
        dead = dead[: len(vectors)]
        if len(dead):
            order = torch.randperm(len(vectors), generator=self._generator(step))
            chosen = vectors[order[: len(dead)].to(vectors.device)]
            self.codes[dead] = chosen
            # With the mean count, so that a code is not dead again before it had time to be used.
            self.count[dead] = mean
            self.total[dead] = chosen * mean
        return len(dead)

    def notice_collapse(self, found: float, tokens: int) -> bool:
        """Count a step of low perplexity; reset the codebook after too many.

        Parameters
        ----------
        found
            The step's perplexity.
        tokens
            The vectors it was counted over.

        Returns
        -------
        bool
            Whether the codebook now waits for a new k-means start.
        """
        # A step of few tokens cannot use more codes than it has tokens, which is no collapse.
        possible = min(self.size, max(1, tokens))
        low = found < self.rules.collapse_share * possible
        self.low_steps.copy_((self.low_steps + 1) * int(low))
        if int(self.low_steps) < self.rules.collapse_steps:
            return False
        # It starts at the next step, when the vectors of all ranks are gathered for k-means.
        self.started.fill_(False)
        return True

    def _generator(self, step: int) -> torch.Generator:
        # On the CPU for any device, so that a run draws the same on all of them. 64 levels at most.
        return torch.Generator().manual_seed((self.rules.seed * 1_000_003 + step) * 64 + self.level)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return the nearest code of each vector by Euclidean distance.

    Parameters
    ----------
    vectors
        float32 [N, D].
    codes
        float32 [K, D].

    Returns
    -------
    Tensor
        int64 [N]; ties go to the lower number.
    """
    # |v - c|^2 / 2 without |v|^2 / 2, which is the same for all codes.
    half_norm = codes.square().sum(dim=1) / 2
    found = [
        torch.addmm(half_norm, part, codes.T, alpha=-1).argmin(dim=1)
        for part in torch.split(vectors, ROWS)
    ]
    return torch.cat(found or [half_norm[:0].long()])


def k_means(vectors: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cluster vectors by Lloyd's algorithm, from vectors drawn at random.

    Parameters
    ----------
    vectors
        float32 [N, D]; where N is less than `size`, some clusters coincide.
    size
        How many clusters. Those left empty move to drawn vectors.
    generator
        On the CPU.

    Returns
    -------
    Tensor
        float32 [size, D].
    """
    order = torch.randperm(len(vectors), generator=generator).to(vectors.device)
    repeats = -(-size // len(vectors))
    codes = vectors[order.repeat(repeats)[:size]].clone()

    for _ in range(K_MEANS_ROUNDS):
        numbers = nearest(vectors, codes)
        count = torch.bincount(numbers, minlength=size).unsqueeze(1)
        total = torch.zeros_like(codes).index_add_(0, numbers, vectors)
        draw = torch.randint(len(vectors), (size,), generator=generator)
        drawn = vectors[draw.to(vectors.device)]
        codes = torch.where(count > 0, total / count.clamp_min(1), drawn)
    return codes


def perplexity(count: Tensor) -> Tensor:
    """Return how many codes in even use would be as varied.

    Parameters
    ----------
    count
        [..., K], how often each code was used.

    Returns
    -------
    Tensor
        float64 [...], exp(entropy in nats); 1 when all counts are 0.
    """
    # float32 cannot count beyond 2^24 tokens, which a held-out split may have.
    total = count.double().sum(dim=-1, keepdim=True)
    share = count.double() / total.clamp_min(1)
    entropy: Tensor = torch.special.entr(share).sum(dim=-1)
    return entropy.exp()
