"""Residual levels of codebooks that follow the encoder."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from utils.log import get_log
from vqvae.quantizers.base import Quantized, Quantizer, gather_vectors, sum_over_ranks
from vqvae.quantizers.codebook import REPLACE_EVERY, Codebook, CodebookRules, nearest

__all__ = ["EmaQuantizer"]

log = get_log(__name__)


class EmaQuantizer(Quantizer):
    """L levels of `Codebook`s.

    Until the codebooks' k-means start, vectors pass unquantized, with codes 0.

    Parameters
    ----------
    size, dim, levels
        K, D and L, as of `Quantizer`.
    rules
        How the codebooks follow the encoder.
    """

    def __init__(self, size: int, dim: int, levels: int, rules: CodebookRules) -> None:
        super().__init__(size, dim, levels)
        self.rules = rules
        # The attribute's name is part of every checkpoint.
        self.books = nn.ModuleList(Codebook(size, dim, rules, level) for level in range(levels))
        self.replaced = 0

    def codebooks(self) -> Iterator[Codebook]:
        """Yield the codebooks, first level first."""
        for book in self.books:
            assert isinstance(book, Codebook)
            yield book

    def forward(self, vectors: Tensor, keep: Tensor, depth: Tensor | None = None) -> Quantized:
        """See `Quantizer`."""
        rest, total = vectors.detach(), torch.zeros_like(vectors)
        commit = vectors.new_zeros(len(vectors))
        codes = []

        for level, codebook in enumerate(self.codebooks()):
            if not codebook.started:
                # What is left of the vector passes, so that the levels above wait too.
                if self.training:
                    total = total + _down_to(rest, level, depth)
                unused = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
                codes += [unused] * (self.levels - level)
                break

            number = codebook.nearest(rest)
            chosen = codebook.decode(number)
            codes.append(number)
            total = total + _down_to(chosen, level, depth)
            rest = rest - chosen
            # `rest` is detached; the gradient reaches the encoder through `vectors`.
            distance = vectors - (vectors.detach() - rest)
            commit = commit + distance.square().mean(dim=1)

        numbers = torch.stack(codes, dim=1)
        if self.training:
            self.seen.append((vectors.detach()[keep], numbers[keep]))
        straight_through = vectors + (total - vectors).detach()
        return Quantized(straight_through, numbers, commit)

    def encode(self, vectors: Tensor) -> Tensor:
        """See `Quantizer`."""
        codes, rest = [], vectors
        for codebook in self.codebooks():
            number = codebook.nearest(rest)
            rest = rest - codebook.decode(number)
            codes.append(number)
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Quantizer`."""
        parts = [
            codebook.decode(column)
            for codebook, column in zip(self.codebooks(), codes.T, strict=False)
        ]
        return torch.stack(parts).sum(dim=0)

    def tables(self) -> list[Tensor]:
        """See `Quantizer`."""
        return [codebook.codes for codebook in self.codebooks()]

    @torch.no_grad()
    def _counted(self, step: int) -> Tensor:
        vectors = torch.cat([vectors for vectors, _ in self.seen])
        codes = torch.cat([codes for _, codes in self.seen])
        self.replaced = 0

        waiting = not all(bool(codebook.started) for codebook in self.codebooks())
        drawing = step >= self.rules.start_step if waiting else step % REPLACE_EVERY == 0
        # Ranks exchange whole vectors only when some are needed as codes.
        pool = gather_vectors(vectors) if drawing else None

        sums = self._level_sums(vectors, codes)
        counts = torch.zeros((self.levels, self.size), device=vectors.device)
        counts[: len(sums)] = sums[..., 0]

        for level, codebook in enumerate(self.codebooks()):
            if level < len(sums):
                before = codebook.codes.clone()
                codebook.update(sums[level])
                if pool is not None:
                    if not waiting:
                        self.replaced += codebook.replace_dead(pool, step)
                    # What this level leaves over for the next is measured with the codes that the
                    # tokens were given.
                    pool = pool - before[nearest(pool, before)]
            elif pool is not None:
                codebook.start(pool, step)
                numbers = codebook.nearest(pool)
                counts[level] = torch.bincount(numbers, minlength=self.size)
                # Without this a later level starts on whole vectors, collapses, and starts again
                # for the rest of the run (docs/log.md).
                pool = pool - codebook.decode(numbers)
        return counts

    def _level_sums(self, vectors: Tensor, codes: Tensor) -> Tensor:
        """Return `Codebook.sums` of the levels that have started, [l, K, 1 + D] over all ranks."""
        sums, rest = [], vectors
        for level, codebook in enumerate(self.codebooks()):
            if not codebook.started:
                break
            sums.append(codebook.sums(rest, codes[:, level]))
            rest = rest - codebook.decode(codes[:, level])
        if not sums:
            return vectors.new_zeros((0, self.size, 1 + self.dim))
        return sum_over_ranks(torch.stack(sums))

    def _repair(self, found: list[float], tokens: int) -> dict[str, float]:
        for level, (codebook, value) in enumerate(zip(self.codebooks(), found, strict=True), 1):
            if codebook.started and codebook.notice_collapse(value, tokens):
                log.warning(
                    "codebook %d collapsed: perplexity %.1f of %d codes for %d steps;"
                    " it starts again by k-means",
                    level,
                    value,
                    self.size,
                    self.rules.collapse_steps,
                )
        return {"dead": float(self.replaced)}


def _down_to(part: Tensor, level: int, depth: Tensor | None) -> Tensor:
    """Return what a level adds [N, D]: nothing for vectors that are decoded from fewer levels."""
    return part if depth is None else part * (depth > level).unsqueeze(1)
