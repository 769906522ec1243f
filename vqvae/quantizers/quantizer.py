"""Residual quantisation of latent vectors by either kind of codebook: each level encodes what the
levels before left over.

`ema`: codebooks that follow the encoder (codebook.py). `fsq`: a fixed grid (fsq.py). Vectors go
straight through for gradients. What a training step saw is kept outside the state (`seen`) until
`step` has used it: a checkpoint after the step needs none of it. With several ranks `step` sums
over them, and is a collective call: all ranks make it, once an optimizer step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.log import get_log
from vqvae.quantizers.codebook import REPLACE_EVERY, Codebook, CodebookRules, nearest, perplexity
from vqvae.quantizers.fsq import Grid, grid_levels

__all__ = ["Quantized", "Quantizer", "make_quantizer"]

log = get_log(__name__)


class Quantized(NamedTuple):
    """vectors: float32 [N, D] with straight-through gradient; codes: int64 [N, L]; commit: float32
    [N], mean squared distance of the encoder's vectors from their codes, summed over levels (0 for
    fsq)."""

    vectors: Tensor
    codes: Tensor
    commit: Tensor


class Quantizer(nn.Module):
    """L levels. `size` K codes a level, `dim` D numbers a vector."""

    copied_by_average = True

    def __init__(self, size: int, dim: int, levels: int) -> None:
        super().__init__()
        self.size, self.dim, self.levels = size, dim, levels
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.epoch_count: Tensor
        self.epoch: Tensor
        self.register_buffer("epoch_count", torch.zeros(levels, size, dtype=torch.int64))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def forward(self, vectors: Tensor, keep: Tensor, depth: Tensor | None = None) -> Quantized:
        """vectors: float32 [N, D]; keep: bool [N], false for vectors that no statistic may see;
        depth: int64 [N], how many levels each vector gets (1..L; None: all)."""
        raise NotImplementedError

    def encode(self, vectors: Tensor) -> Tensor:
        """int64 [N, L]."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """codes: int64 [N, l], l of the levels from the first on; float32 [N, D]."""
        raise NotImplementedError

    def tables(self) -> list[Tensor]:
        """What each code of each level adds, float32 [K, D] a level."""
        raise NotImplementedError

    def measured(self, vectors: Tensor) -> Tensor:
        """float32 [N, D] as what `tables` are compared with and `decode` gives back approximately."""
        return vectors

    def step(self, step: int, epoch: int) -> dict[str, float]:
        """End an optimizer step: update what follows the data; figures of the step over all ranks.

        pplx: perplexity of the first level, log2_tokens: log2 of the vectors it was counted over,
        usage: share of its codes used in this epoch so far; pplx_<l> of the levels above; dead:
        codes replaced.
        """
        counted = self._counted(step)
        if int(self.epoch) != epoch:
            self.epoch_count.zero_()
            self.epoch.fill_(epoch)
        self.epoch_count += counted.long()
        self.seen = []
        found, tokens = perplexity(counted).tolist(), int(counted[0].sum())
        figures = {
            "pplx": found[0],
            "log2_tokens": math.log2(max(1, tokens)),
            "usage": float((self.epoch_count[0] > 0).float().mean()),
        }
        return (
            figures
            | {f"pplx_{level}": value for level, value in enumerate(found[1:], 2)}
            | self._mend(found, tokens)
        )

    def _counted(self, step: int) -> Tensor:
        """int64 [L, K] over all ranks; the codebooks move."""
        codes = torch.cat([codes for _, codes in self.seen])
        return _sum(
            torch.stack(
                [
                    torch.bincount(codes[:, level], minlength=self.size)
                    for level in range(self.levels)
                ]
            )
        )

    def _mend(self, found: list[float], tokens: int) -> dict[str, float]:
        return {}


class EmaQuantizer(Quantizer):
    """Residual levels of `Codebook`s.

    Until the k-means start vectors pass unquantised, with codes 0.
    """

    def __init__(self, size: int, dim: int, levels: int, rules: CodebookRules) -> None:
        super().__init__(size, dim, levels)
        self.rules = rules
        self.books = nn.ModuleList(Codebook(size, dim, rules, level) for level in range(levels))
        self.replaced = 0

    def forward(self, vectors: Tensor, keep: Tensor, depth: Tensor | None = None) -> Quantized:
        codes, rest, total = [], vectors.detach(), torch.zeros_like(vectors)
        commit = vectors.new_zeros(len(vectors))
        for level, book in enumerate(self.books):
            if not book.started:
                # Whatever is left of the vector passes, so that the levels above wait too.
                if self.training:
                    total = (
                        total + rest
                        if depth is None
                        else total + rest * (depth > level).unsqueeze(1)
                    )
                codes += [torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)] * (
                    self.levels - level
                )
                break
            number = book.nearest(rest)
            chosen = book.decode(number)
            codes.append(number)
            total = total + (chosen if depth is None else chosen * (depth > level).unsqueeze(1))
            rest = rest - chosen
            commit = commit + (vectors - (vectors.detach() - rest)).square().mean(dim=1)
        numbers = torch.stack(codes, dim=1)
        if self.training:
            self.seen.append((vectors.detach()[keep], numbers[keep]))
        return Quantized(vectors + (total - vectors).detach(), numbers, commit)

    def encode(self, vectors: Tensor) -> Tensor:
        codes, rest = [], vectors
        for book in self.books:
            codes.append(book.nearest(rest))
            rest = rest - book.decode(codes[-1])
        return torch.stack(codes, dim=1)

    def tables(self) -> list[Tensor]:
        return [book.codes for book in self.books]

    def decode(self, codes: Tensor) -> Tensor:
        return torch.stack(
            [
                book.decode(codes[:, level])
                for level, book in zip(range(codes.shape[1]), self.books, strict=False)
            ]
        ).sum(dim=0)

    @torch.no_grad()
    def _counted(self, step: int) -> Tensor:
        vectors, codes = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        counts = torch.zeros((self.levels, self.size), device=vectors.device)
        self.replaced = 0
        waiting = not all(bool(book.started) for book in self.books)
        # Vectors themselves travel between ranks only when some are needed as codes.
        drawing = (waiting and step >= self.rules.start_step) or (
            not waiting and step % REPLACE_EVERY == 0
        )
        pool = _gather(vectors) if drawing else None
        sums, rest = [], vectors
        for level, book in enumerate(self.books):
            if not book.started:
                break
            sums.append(book.sums(rest, codes[:, level]))
            rest = rest - book.decode(codes[:, level])
        if sums:
            summed = _sum(torch.stack(sums))
            counts[: len(sums)] = summed[..., 0]
        for level, book in enumerate(self.books):
            if level < len(sums):
                before = book.codes.clone()
                book.update(summed[level])
                if pool is not None:
                    if not waiting:
                        self.replaced += book.replace_dead(pool, step)
                    # What this level leaves over for the next is measured with the codes the tokens
                    # were given.
                    pool = pool - before[nearest(pool, before)]
            elif pool is not None:
                book.start(pool, step)
                numbers = book.nearest(pool)
                counts[level] = torch.bincount(numbers, minlength=self.size)
                pool = pool - book.decode(numbers)
        return counts

    def _mend(self, found: list[float], tokens: int) -> dict[str, float]:
        for level, (book, value) in enumerate(zip(self.books, found, strict=True), 1):
            if book.started and book.notice_collapse(value, tokens):
                log.warning(
                    "codebook %d collapsed: perplexity %.1f of %d codes for %d steps; it starts anew by k-means",
                    level,
                    value,
                    self.size,
                    self.rules.collapse_steps,
                )
        return {"dead": float(self.replaced)}


class FsqQuantizer(Quantizer):
    """FSQ and its refinements as the control that cannot collapse."""

    def __init__(self, size: int, levels: int) -> None:
        grid = Grid(grid_levels(size))
        super().__init__(size, grid.dim, levels)
        self.grid = grid

    def forward(self, vectors: Tensor, keep: Tensor, depth: Tensor | None = None) -> Quantized:
        bounded = self.grid.bound(vectors)
        codes = self.grid.split(bounded.detach(), self.levels)
        parts = self.grid.parts(codes)
        total = sum(
            part if depth is None else part * (depth > level).unsqueeze(1)
            for level, part in enumerate(parts)
        )
        smooth = bounded / (self.grid.levels // 2)
        if self.training:
            self.seen.append((vectors.detach()[:0], codes[keep]))
        return Quantized(smooth + (total - smooth).detach(), codes, vectors.new_zeros(len(vectors)))

    def encode(self, vectors: Tensor) -> Tensor:
        return self.grid.split(self.grid.bound(vectors), self.levels)

    def tables(self) -> list[Tensor]:
        every = torch.arange(self.size, device=self.grid.levels.device)
        return self.grid.parts(every.unsqueeze(1).expand(-1, self.levels))

    def measured(self, vectors: Tensor) -> Tensor:
        return self.grid.bound(vectors) / (self.grid.levels // 2)

    def decode(self, codes: Tensor) -> Tensor:
        return torch.stack(self.grid.parts(codes)).sum(dim=0)


def make_quantizer(kind: str, size: int, dim: int, levels: int, rules: CodebookRules) -> Quantizer:
    """kind: ema or fsq (whose dim follows from size)."""
    return EmaQuantizer(size, dim, levels, rules) if kind == "ema" else FsqQuantizer(size, levels)


def _many() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _sum(values: Tensor) -> Tensor:
    if _many():
        torch.distributed.all_reduce(values)
    return values


def _gather(vectors: Tensor) -> Tensor:
    """[N, D] of this rank to those of all ranks in their order."""
    if not _many():
        return vectors
    count = torch.distributed.get_world_size()
    sizes = torch.zeros(count, dtype=torch.int64, device=vectors.device)
    sizes[torch.distributed.get_rank()] = len(vectors)
    torch.distributed.all_reduce(sizes)
    held = vectors.new_zeros((int(sizes.max()), vectors.shape[1]))
    held[: len(vectors)] = vectors
    parts = [torch.empty_like(held) for _ in range(count)]
    torch.distributed.all_gather(parts, held)
    return torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])
