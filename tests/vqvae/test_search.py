"""Codes chosen for rate and error: the nearest, brute force, what a bit costs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vqvae.compress.search
from vqvae.compress.blocks import numbered
from vqvae.compress.search import CodeSearch, learn_search
from vqvae.quantizers.codebook import CodebookRules
from vqvae.quantizers.quantizer import make_quantizer


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def books(levels: int, size: int, dim: int, seed: int = 1) -> list[torch.Tensor]:
    return [drawn(size, dim, seed=seed + level) / 2**level for level in range(levels)]


def decoded(rows: torch.Tensor, tables: list[torch.Tensor]) -> torch.Tensor:
    return sum(table[rows[:, level]] for level, table in enumerate(tables))


@pytest.mark.parametrize("kind", ["ema", "fsq"])
def test_without_a_price_and_other_paths_codes_are_the_nearest_at_each_level(kind: str) -> None:
    quantizer = make_quantizer(kind, 64, 3, 3, CodebookRules(start_step=0)).train()
    z = drawn(500, quantizer.dim)
    quantizer(z, torch.ones(500, dtype=torch.bool))
    quantizer.step(0, 0)
    quantizer.eval()
    places = quantizer.measured(z)
    search = learn_search(places, quantizer.tables(), weight=0.0, paths=1)
    rows = search.choose(places, quantizer.tables())
    torch.testing.assert_close(quantizer.decode(rows), decoded(rows, quantizer.tables()))
    one, other = (
        (quantizer.decode(codes) - places).square().sum(1) for codes in (rows, quantizer.encode(z))
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 50), st.floats(0, 2))
@settings(max_examples=30, deadline=None)
def test_with_paths_enough_the_choice_is_brute_force_s(
    size: int, levels: int, seed: int, worth: float
) -> None:
    tables, z = books(levels, size, 3, seed), drawn(20, 3, seed=seed + 100)
    price = worth * drawn(levels, size, seed=seed + 200).abs()
    search = CodeSearch(price, torch.arange(size).expand(levels, -1), paths=size**levels)
    every = torch.tensor(list(itertools.product(range(size), repeat=levels)))
    paid = sum(price[level][every[:, level]] for level in range(levels))
    cost = (z[:, None] - decoded(every, tables)[None]).square().sum(-1) + paid
    rows = search.choose(z, tables)
    found = (z - decoded(rows, tables)).square().sum(-1) + sum(
        price[level][rows[:, level]] for level in range(levels)
    )
    torch.testing.assert_close(found, cost.min(dim=1).values, rtol=1e-4, atol=1e-4)


def test_more_paths_never_cost_more_error() -> None:
    tables, z = books(4, 16, 6), drawn(3000, 6)
    errors = []
    for paths in (1, 2, 8):
        search = CodeSearch(torch.zeros(4, 16), torch.arange(16).expand(4, -1), paths)
        errors.append(float((z - decoded(search.choose(z, tables), tables)).square().mean()))
    assert errors[0] > 1.02 * errors[1] > errors[2]


def test_a_bit_that_is_worth_more_is_spent_less_and_errors_grow() -> None:
    tables, z = books(3, 32, 4), drawn(4000, 4) * drawn(4000, 1, seed=9).exp()
    points = []
    for weight in (0, 2, 8, 32):
        search = learn_search(z, tables, weight, paths=2)
        rows = search.choose(z, tables)
        share = torch.stack([torch.bincount(column, minlength=32) for column in rows.T]) / len(z)
        points.append(
            (
                float(torch.special.entr(share).sum()),
                float((z - decoded(rows, tables)).square().mean()),
            )
        )
    bits, errors = zip(*points, strict=True)
    assert list(bits) == sorted(bits, reverse=True)
    assert bits[-1] < 0.7 * bits[0]
    assert list(errors) == sorted(errors)


def test_codes_are_numbered_by_use() -> None:
    tables, z = books(2, 16, 4), drawn(2000, 4)
    search = learn_search(z, tables, 1.0, paths=2)
    assert all(row.sort().values.tolist() == list(range(16)) for row in search.order)
    rows = search.choose(z, tables)
    numbers = torch.from_numpy(numbered(rows.numpy(), search))
    assert torch.equal(
        torch.stack([search.order[level][numbers[:, level]] for level in range(2)], dim=1), rows
    )
    counts = torch.bincount(numbers[:, 0], minlength=16)
    assert float(counts[:4].sum()) > 1.5 * float(counts[-4:].sum())


def test_a_choice_does_not_depend_on_its_neighbours_in_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables, z = books(3, 32, 8), drawn(2500, 8)
    search = learn_search(z, tables, 1.0, paths=4)
    beam, sizes = vqvae.compress.search._beam, []
    monkeypatch.setattr(
        vqvae.compress.search,
        "_beam",
        lambda part, *rest: sizes.append(len(part)) or beam(part, *rest),
    )
    whole = search.choose(z, tables)
    monkeypatch.setattr(vqvae.compress.search, "CELLS", 700 * 4 * 32)
    assert (whole == search.choose(z, tables)).float().mean() > 0.999
    assert sizes == [2500, 700, 700, 700, 400], (
        "no more cells at once than allowed, and every vector once"
    )
