"""Choosing codes for their rate as well as their error: squared error + price of the code, over
several paths through the levels.

Entropy-constrained vector quantisation (Chou, Lookabaugh, Gray 1989, doi:10.1109/29.17498) with a
beam search over residual levels. A code's price is its ideal length in bits, -log2 of its share,
times what a bit is worth; shares come from coding training blocks that way, a few rounds from even
ones. Codes are then numbered by use, so that the bytes of the common ones are small and zstd's
Huffman stage sees few values. A function of (checkpoint, cube, settings). Given up: context between
positions, which no Zarr codec could decode.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vqvae.quantizers.codebook import nearest

__all__ = ["CodeSearch", "learn_search"]

CELLS = 1 << 21
"""Vectors x paths x codes that are compared at once, which bounds the memory."""
ROUNDS = 4
UNSEEN = 0.01
"""Count of a code that no training token chose."""
STEPS = 64
"""Bits are rounded to 1/64, so that a rounding of sums does not choose other codes."""


@dataclass(frozen=True)
class CodeSearch:
    """price: float32 [L, K] in squared error; order.

    Int64 [L, K], the codebook's row of each number on disk; paths kept a level.
    """

    price: Tensor
    order: Tensor
    paths: int

    @property
    def digest(self) -> str:
        """sha256 of prices and numbers: what another one would code and number otherwise."""
        return hashlib.sha256(
            self.price.numpy().tobytes() + self.order.numpy().tobytes()
        ).hexdigest()

    def choose(self, vectors: Tensor, books: Sequence[Tensor]) -> Tensor:
        """Rows of the codebooks, int64 [N, L]. vectors: float32 [N, D]; books.

        Float32 [K, D], a level each.
        """
        return _searched(vectors, books, self.price.to(vectors.device), self.paths)


def learn_search(vectors: Tensor, books: Sequence[Tensor], weight: float, paths: int) -> CodeSearch:
    """vectors: float32 [N, D] of training blocks; weight.

    Thousandths of their variance that a bit is worth.
    """
    size = len(books[0])
    worth = weight / 1000 * float(vectors.var(dim=0, correction=0).sum())
    price = torch.zeros((len(books), size))
    for _ in range(ROUNDS if worth else 1):
        rows = _searched(vectors, books, price, min(paths, 2))
        count = torch.stack([torch.bincount(column, minlength=size) for column in rows.T]) + UNSEEN
        price = worth * (-(count / count.sum(dim=1, keepdim=True)).log2() * STEPS).round() / STEPS
    return CodeSearch(price, count.argsort(dim=1, descending=True, stable=True), paths)


def _searched(vectors: Tensor, books: Sequence[Tensor], price: Tensor, paths: int) -> Tensor:
    rows = max(1, CELLS // (paths * len(books[0])))
    return torch.cat([_beam(part, books, price, paths) for part in torch.split(vectors, rows)])


def _beam(vectors: Tensor, books: Sequence[Tensor], price: Tensor, paths: int) -> Tensor:
    """The cheapest of `paths` sequences of codes for each vector, int64 [N, L]."""
    if paths == 1 and not price.any():
        return _greedy(vectors, books)
    count = len(vectors)
    rest, spent = vectors.unsqueeze(1), vectors.new_zeros((count, 1))
    path = torch.zeros((count, 1, 0), dtype=torch.int64, device=vectors.device)
    for level, book in enumerate(books):
        error = (
            rest.square().sum(dim=-1, keepdim=True) - 2 * (rest @ book.T) + book.square().sum(dim=1)
        )
        cost = (error + spent.unsqueeze(-1) + price[level]).flatten(1)
        best = cost.topk(min(paths, cost.shape[1]), dim=1, largest=False, sorted=True).indices
        before, code = best // len(book), best % len(book)
        rest = rest.gather(1, before.unsqueeze(-1).expand(-1, -1, rest.shape[-1])) - book[code]
        spent = spent.gather(1, before) + price[level][code]
        path = torch.cat(
            [path.gather(1, before.unsqueeze(-1).expand(-1, -1, level)), code.unsqueeze(-1)], dim=-1
        )
    return path[:, 0]


def _greedy(vectors: Tensor, books: Sequence[Tensor]) -> Tensor:
    codes, rest = [], vectors
    for book in books:
        codes.append(nearest(rest, book))
        rest = rest - book[codes[-1]]
    return torch.stack(codes, dim=1)
