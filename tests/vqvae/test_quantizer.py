"""Codebooks and FSQ: against vector-quantize-pytorch, over ranks, through collapse."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae.quantizers.codebook import Codebook, CodebookRules, k_means, nearest, perplexity
from vqvae.quantizers.fsq import Grid, grid_levels
from vqvae.quantizers.quantizer import make_quantizer
from warehouse.errors import ConfigError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vector_quantize_pytorch import FSQ, VectorQuantize

ROOT = Path(__file__).parents[2]
AT_ONCE = CodebookRules(start_step=0)


def vectors(count: int, dim: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn((count, dim), generator=torch.Generator().manual_seed(seed))


def ema(size: int = 32, dim: int = 6, levels: int = 1, **rules: object):
    return make_quantizer(
        "ema", size, dim, levels, CodebookRules(**{"start_step": 0} | rules)
    ).train()


def run_step(quantizer, z: torch.Tensor, step: int) -> dict[str, float]:
    quantizer(z, torch.ones(len(z), dtype=torch.bool))
    return quantizer.step(step, 0)


def test_one_ema_step_is_the_oracle_s() -> None:
    size, dim = 32, 6
    start = vectors(size, dim, 1)
    oracle = VectorQuantize(
        dim=dim, codebook_size=size, decay=0.99, threshold_ema_dead_code=0
    ).train()
    inner = oracle._codebook
    book = Codebook(size, dim, CodebookRules())
    weight = torch.rand(size, generator=torch.Generator().manual_seed(2)) * 5 + 1
    inner.embed.data.copy_(start[None])
    inner.embed_avg.data.copy_((start * weight[:, None])[None])
    inner.cluster_size.data.copy_(weight[None])
    book.codes.copy_(start)
    book.total.copy_(start * weight[:, None])
    book.count.copy_(weight)
    for turn in range(3):
        z = vectors(200, dim, 10 + turn)
        _, wanted, _ = oracle(z[None])
        numbers = book.nearest(z)
        assert torch.equal(numbers, wanted[0])
        book.update(book.sums(z, numbers))
        torch.testing.assert_close(book.count, inner.cluster_size[0])
        torch.testing.assert_close(book.codes, inner.embed[0])


@pytest.mark.parametrize("levels", [(8, 8, 8), (8, 5, 5, 5), (7, 4), (4,)])
def test_fsq_indices_values_and_gradients_are_the_oracle_s(levels: tuple[int, ...]) -> None:
    grid = Grid(levels)
    oracle = FSQ(list(levels))
    z = vectors(500, len(levels), 3, scale=2.0)
    theirs = z.clone().requires_grad_()
    wanted, indices = oracle(theirs[None])
    codes = grid.split(grid.bound(z), 1)
    assert torch.equal(codes[:, 0], indices[0].long())
    torch.testing.assert_close(grid.parts(codes)[0], wanted[0].detach())
    if levels == (8, 8, 8):
        ours = z.clone().requires_grad_()
        found = make_quantizer("fsq", 512, 99, 1, AT_ONCE)(
            ours, torch.ones(len(z), dtype=torch.bool)
        )
        (found.vectors * torch.arange(3)).sum().backward()
        (wanted * torch.arange(3)).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@given(st.integers(1, 4), st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_each_further_fsq_level_comes_closer_to_the_bounded_vector(levels: int, seed: int) -> None:
    grid = Grid((8, 5))
    bounded = grid.bound(vectors(64, 2, seed, 2.0))
    parts = grid.parts(grid.split(bounded, levels))
    wanted, total, cell = bounded / (grid.levels // 2), 0, 0.5 / (grid.levels // 2)
    for part in parts:
        total = total + part
        assert bool(((total - wanted).abs() <= cell + 1e-5).all())
        cell = cell / grid.levels


@pytest.mark.parametrize(
    ("size", "wanted"), [(512, (8, 8, 8)), (256, (8, 8, 4)), (1000, (8, 5, 5, 5)), (7, (7,))]
)
def test_fsq_levels_multiply_to_the_codebook_size(size: int, wanted: tuple[int, ...]) -> None:
    assert grid_levels(size) == wanted


@pytest.mark.parametrize("size", [13, 22, 3])
def test_a_codebook_size_that_is_no_grid_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="a product of numbers from 4 to 8"):
        grid_levels(size)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_nearest_is_the_brute_force_s(count: int, size: int, dim: int, seed: int) -> None:
    z, codes = vectors(count, dim, seed).double(), vectors(size, dim, seed + 1).double()
    distance = (z[:, None] - codes[None]).square().sum(-1)
    found = nearest(z, codes)
    assert found.dtype == torch.int64
    torch.testing.assert_close(distance.gather(1, found[:, None])[:, 0], distance.min(dim=1).values)


def test_nearest_holds_no_matrix_of_tokens_by_codes() -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    book = Codebook(256, 2, CodebookRules())
    z = vectors(40_000, 2)
    with Watch():
        book.sums(z, book.nearest(z))
    assert largest <= 8192 * 256


def test_k_means_finds_clusters_and_does_with_fewer_vectors_than_codes() -> None:
    centres = 100 * vectors(8, 3, 5)
    z = centres.repeat(50, 1) + 0.01 * vectors(400, 3, 6)
    codes = k_means(z, 16, torch.Generator().manual_seed(0))
    assert float((centres[:, None] - codes[None]).norm(dim=-1).min(dim=1).values.max()) < 1
    assert k_means(z[:5], 16, torch.Generator().manual_seed(0)).shape == (16, 3)


def test_perplexity_is_exp_of_entropy() -> None:
    assert perplexity(
        torch.tensor([[3, 3, 3, 3], [5, 0, 0, 0], [0, 0, 0, 0]])
    ).tolist() == pytest.approx([4, 1, 1])
    share = np.array([1, 2, 5]) / 8
    assert float(perplexity(torch.tensor([1, 2, 5]))) == pytest.approx(
        np.exp(-(share * np.log(share)).sum())
    )


def test_vectors_pass_until_the_k_means_start_and_are_codes_after() -> None:
    quantizer, z = ema(start_step=2), vectors(300, 6)
    keep = torch.ones(300, dtype=torch.bool)
    for step in range(3):
        assert torch.equal(quantizer(z, keep).vectors, z)
        quantizer.step(step, 0)
    found = quantizer(z, keep)
    torch.testing.assert_close(found.vectors, quantizer.decode(found.codes))
    assert torch.equal(found.codes, quantizer.encode(z))
    assert float((found.vectors - z).square().mean()) < 0.5 * float(z.var())


@pytest.mark.parametrize("kind", ["ema", "fsq"])
def test_more_residual_levels_say_more_and_gradients_pass_straight_through(kind: str) -> None:
    quantizer = make_quantizer(kind, 64, 3, 4, AT_ONCE).train()
    z = vectors(2000, quantizer.dim, scale=0.5)
    for step in range(3):
        run_step(quantizer, z, step)
    codes = quantizer.encode(z)
    wanted = z if kind == "ema" else quantizer.grid.bound(z) / (quantizer.grid.levels // 2)
    errors = [
        float((quantizer.decode(codes[:, :level]) - wanted).square().mean())
        for level in range(1, 5)
    ]
    assert all(later < 0.7 * former for former, later in pairwise(errors))
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 64
    if kind == "ema":
        lead = z.clone().requires_grad_()
        quantizer(lead, torch.ones(len(z), dtype=torch.bool)).vectors.sum().backward()
        assert torch.equal(lead.grad, torch.ones_like(z))


def test_the_commitment_is_the_squared_distance_of_every_level_and_pulls_the_encoder() -> None:
    quantizer, z = ema(levels=2), vectors(200, 6)
    run_step(quantizer, z, 0)
    lead = z.clone().requires_grad_()
    found = quantizer(lead, torch.ones(200, dtype=torch.bool))
    first = quantizer.decode(found.codes[:, :1])
    both = quantizer.decode(found.codes)
    wanted = (z - first).square().mean(1) + (z - both).square().mean(1)
    torch.testing.assert_close(found.commit.detach(), wanted)
    found.commit.sum().backward()
    torch.testing.assert_close(lead.grad, 2 * (2 * z - first - both) / 6)


def test_depth_limits_the_levels_of_each_vector() -> None:
    quantizer, z = ema(levels=3), vectors(120, 6)
    run_step(quantizer, z, 0)
    depth = torch.arange(120) % 3 + 1
    found = quantizer(z, torch.ones(120, dtype=torch.bool), depth)
    for level in (1, 2, 3):
        torch.testing.assert_close(
            found.vectors[depth == level], quantizer.decode(found.codes[depth == level, :level])
        )


def test_vectors_left_out_change_no_statistic() -> None:
    z = vectors(300, 6)
    keep = torch.arange(300) < 200
    one, other = ema(levels=2), ema(levels=2)
    for step in range(12):
        one(z, keep)
        other(z[:200], keep[:200])
        assert one.step(step, 0) == other.step(step, 0)
    assert all(
        torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items()
    )


def test_accumulated_batches_move_the_codebook_like_one() -> None:
    z = vectors(400, 6)
    one, other = ema(levels=2), ema(levels=2)
    for step in range(12):
        one(z, torch.ones(400, dtype=torch.bool))
        for part in z.split(150):
            other(part, torch.ones(len(part), dtype=torch.bool))
        one.step(step, 0)
        other.step(step, 0)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], msg=name)


def test_dead_codes_move_onto_vectors_of_the_step_with_fresh_averages() -> None:
    quantizer, z = ema(decay=0.5, collapse_share=0.0), vectors(500, 6)
    run_step(quantizer, z, 0)
    book = quantizer.books[0]
    for state in (book.codes, book.total):
        state[:10] += 1000 * (1 if state is book.codes else float(book.count[:10].mean()))
    replaced = [run_step(quantizer, z, step)["dead"] for step in range(1, 41)]
    assert sum(replaced) >= 10
    assert float(book.codes.abs().max()) < 10
    assert len(book.nearest(z).unique()) == 32
    torch.testing.assert_close(book.codes, book.total / book.count[:, None], rtol=1e-3, atol=1e-3)


def test_a_collapsed_codebook_is_noticed_logged_and_starts_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    quantizer, z = ema(collapse_steps=5, dead_share=0.0), vectors(500, 6)
    run_step(quantizer, z, 0)
    healthy = run_step(quantizer, z, 1)["pplx"]
    book = quantizer.books[0]
    book.codes[1:] = 1e4
    book.total[1:] = 1e4 * book.count[1:, None]
    found = [run_step(quantizer, z, step)["pplx"] for step in range(2, 12)]
    assert found[:5] == [1.0] * 5
    assert "collapsed: perplexity 1.0 of 32 codes for 5 steps" in caplog.text
    assert found[-1] > 0.8 * healthy


def test_a_restarted_level_starts_from_what_the_levels_below_leave_over() -> None:
    quantizer, z = ema(levels=3), vectors(500, 6)
    run_step(quantizer, z, 0)
    left = float((z - quantizer.decode(quantizer.encode(z)[:, :2])).square().mean())
    quantizer.books[2].started.fill_(False)
    run_step(quantizer, z, 1)
    assert float(quantizer.books[2].codes.square().mean()) < 2 * left
    assert float((z - quantizer.decode(quantizer.encode(z))).square().mean()) < 0.7 * left


def test_a_step_s_figures_count_codes_of_the_step_and_of_the_epoch() -> None:
    quantizer, z = ema(), vectors(256, 6)
    run_step(quantizer, z, 0)
    codes = quantizer.encode(z)[:, 0]
    figures = run_step(quantizer, z, 1)
    assert figures["pplx"] == pytest.approx(float(perplexity(torch.bincount(codes, minlength=32))))
    assert figures["log2_tokens"] == 8
    one = z[codes == codes[0]]
    quantizer(one, torch.ones(len(one), dtype=torch.bool))
    assert quantizer.step(2, epoch=1)["usage"] == 1 / 32


def test_two_gloo_ranks_see_the_codebook_of_one_process(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys, torch
        from vqvae.quantizers.codebook import CodebookRules
        from vqvae.quantizers.quantizer import make_quantizer
        rank, count = int(sys.argv[1]), int(sys.argv[2])
        if count > 1:
            torch.distributed.init_process_group(
                "gloo",
                rank=rank,
                world_size=count,
                init_method=f"tcp://127.0.0.1:{sys.argv[3]}",
            )
        rules = CodebookRules(start_step=1, dead_share=0.3)
        quantizer = make_quantizer("ema", 32, 6, 2, rules).train()
        dead = 0
        for step in range(25):
            generator = torch.Generator().manual_seed(step)
            z = torch.randn((301, 6), generator=generator) * (1 + step % 3)
            own = z[:150], z[150:]
            z = own[rank] if count > 1 else z
            quantizer(z, torch.arange(len(z)) >= 0)
            dead += quantizer.step(step, 0)["dead"]
        torch.save({**quantizer.state_dict(), "dead": torch.tensor(dead)}, sys.argv[4])
        if count > 1:
            torch.distributed.destroy_process_group()
    """)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    runs = [(0, 1, "one"), (0, 2, "first"), (1, 2, "second")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(count), str(port), str(tmp_path / name)],
            env=environment,
        )
        for rank, count, name in runs
    ]
    assert [process.wait(timeout=600) for process in started] == [0, 0, 0]
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for _, _, name in runs)
    assert int(one["dead"]) > 0, "the case must replace codes"
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(first[name], second[name]), name
