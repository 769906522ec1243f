"""Choosing codes for their rate as well as for their error.

This is entropy-constrained vector quantisation (Chou, Lookabaugh, Gray 1989,
doi:10.1109/29.17498) with a beam search over residual levels: of several sequences of codes, the
one with the least squared error + price is chosen. The price of a code is its ideal length in bits,
-log2 of its share, times what a bit is worth. Shares come from coding training blocks in this way,
in a few rounds that begin with equal prices. Codes are then numbered by use. Everything is a
function of (checkpoint, cube, settings). What is given up is context between positions, which no
Zarr codec could decode.
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

# Not 0: an infinite price would forbid a code that held-out blocks may need.
UNSEEN = 0.01
"""Count of a code that no training token chose."""

# Sums are rounded differently with another number of threads; exact prices would then choose other
# codes, and a resumed build would have to start again.
STEPS = 64
"""Prices are rounded to 1/64 bit."""


@dataclass(frozen=True)
class CodeSearch:
    """How codes are chosen and numbered.

    Parameters
    ----------
    price
        float32 [L, K], in units of the squared error.
    order
        int64 [L, K], the codebook's row of each number on disk.
    paths
        Sequences of codes that are kept at each level.
    """

    price: Tensor
    order: Tensor
    paths: int

    @property
    def digest(self) -> str:
        """The sha256 of prices and numbers: with another one, codes are not comparable."""
        learned = self.price.numpy().tobytes() + self.order.numpy().tobytes()
        return hashlib.sha256(learned).hexdigest()

    def choose(self, vectors: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Choose the codes of vectors.

        Parameters
        ----------
        vectors
            float32 [N, D].
        tables
            The codes of each level, float32 [K, D].

        Returns
        -------
        Tensor
            int64 [N, L], rows of the tables.
        """
        return _searched(vectors, tables, self.price.to(vectors.device), self.paths)


def learn_search(
    vectors: Tensor, tables: Sequence[Tensor], weight: float, paths: int
) -> CodeSearch:
    """Learn prices and numbers of codes.

    Parameters
    ----------
    vectors
        float32 [N, D], of training blocks.
    tables
        The codes of each level, float32 [K, D].
    weight
        Thousandths of the vectors' variance that a bit is worth.
    paths
        Sequences of codes that are kept at each level.
    """
    size = len(tables[0])
    worth = weight / 1000 * float(vectors.var(dim=0, correction=0).sum())
    price = torch.zeros((len(tables), size))

    # Free bits have no prices to settle: one round counts the nearest codes.
    for _ in range(ROUNDS if worth else 1):
        rows = _searched(vectors, tables, price, min(paths, 2))
        count = torch.stack([torch.bincount(column, minlength=size) for column in rows.T]) + UNSEEN
        bits = -(count / count.sum(dim=1, keepdim=True)).log2()
        price = worth * (bits * STEPS).round() / STEPS

    # By use, so that common codes have small numbers: the upper byte of most is 0 and zstd's
    # Huffman stage sees few values, which saves 4-13% of the bytes (docs/log.md). Stable, so that
    # equal counts are numbered the same on every machine.
    return CodeSearch(price, count.argsort(dim=1, descending=True, stable=True), paths)


def _searched(vectors: Tensor, tables: Sequence[Tensor], price: Tensor, paths: int) -> Tensor:
    rows = max(1, CELLS // (paths * len(tables[0])))
    return torch.cat([_beam(part, tables, price, paths) for part in torch.split(vectors, rows)])


def _beam(vectors: Tensor, tables: Sequence[Tensor], price: Tensor, paths: int) -> Tensor:
    """Return the cheapest of `paths` sequences of codes for each vector, int64 [N, L]."""
    # The encoder's own arithmetic, so that weight 0 with one path gives its codes also where two
    # are almost equally near.
    if paths == 1 and not price.any():
        return _greedy(vectors, tables)

    count = len(vectors)
    rest, spent = vectors.unsqueeze(1), vectors.new_zeros((count, 1))
    path = torch.zeros((count, 1, 0), dtype=torch.int64, device=vectors.device)

    for level, table in enumerate(tables):
        # Expanded, since the differences themselves would be vectors x paths x codes x D numbers.
        products, norms = rest @ table.T, table.square().sum(dim=1)
        error = rest.square().sum(dim=-1, keepdim=True) - 2 * products + norms
        cost = (error + spent.unsqueeze(-1) + price[level]).flatten(1)
        best = cost.topk(min(paths, cost.shape[1]), dim=1, largest=False, sorted=True).indices

        before, code = best // len(table), best % len(table)
        rest = rest.gather(1, before.unsqueeze(-1).expand(-1, -1, rest.shape[-1])) - table[code]
        spent = spent.gather(1, before) + price[level][code]
        earlier = path.gather(1, before.unsqueeze(-1).expand(-1, -1, level))
        path = torch.cat([earlier, code.unsqueeze(-1)], dim=-1)
    return path[:, 0]


def _greedy(vectors: Tensor, tables: Sequence[Tensor]) -> Tensor:
    codes, rest = [], vectors
    for table in tables:
        codes.append(nearest(rest, table))
        rest = rest - table[codes[-1]]
    return torch.stack(codes, dim=1)
