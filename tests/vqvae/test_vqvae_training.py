"""Training a small VQ-VAE on made-up blocks.

Order, windows, resume, accumulation, collapse, pictures.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from vqvae_fakes import FEATURES, blocks

from utils.samplers import ChunkBatchSampler, RandomBatchSampler
from utils.training.checkpoint import load_checkpoint
from utils.training.loop import Trainer
from utils.training.ranks import Ranks
from vqvae.block_sampling import (
    KeptChunkSampler,
    KeptRandomSampler,
    cut,
    make_sampler,
    sample_depth,
)
from vqvae.compress.codec import restore_vqvae
from vqvae.metrics import as_result
from vqvae.settings import VqvaeSettings
from vqvae.task import VqvaeTask
from warehouse.errors import StateError, TrainingError

ALONE = Ranks(0, 1, torch.device("cpu"))
CHUNK = (5, 8, 8)
BLOCKS = blocks(60)


class FakeLoader:
    """The ChunkLoader contract over BLOCKS, in a real sampler's order."""

    def __init__(self, batch_size: int = 8) -> None:
        self.sampler = ChunkBatchSampler([24, 24, 12], batch_size, seed=3)
        self.set_epoch, self.state_dict, self.load_state_dict = (
            getattr(self.sampler, name) for name in ("set_epoch", "state_dict", "load_state_dict")
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        for indices in self.sampler:
            yield {key: value[indices] for key, value in BLOCKS.items()}


class FakeSplit:
    name, chunk_sizes = "train", (4, 3, 3)

    def __init__(self, shares: list[float]) -> None:
        self.valid_share = np.array(shares, np.float32)


class Quick(VqvaeTask):
    """Without pictures, which take longer than the training."""

    def draw(self, history: list[dict[str, object]], path: Path) -> None:
        pass


def settings(**changes: object) -> VqvaeSettings:
    small = {
        "epochs": 2,
        "batch_size": 8,
        "warmup_steps": 2,
        "lr": 2e-3,
        "device": "cpu",
        "width": 16,
        "depth": 1,
        "codebook_size": 32,
        "code_dim": 4,
        "levels": 2,
        "start_step": 2,
        "log_interval": 1,
    }
    return VqvaeSettings(**small | changes)


def train(
    output: Path, task: VqvaeTask | None = None, batch_size: int = 8, **changes: object
) -> dict[str, object]:
    chosen = settings(batch_size=batch_size, **changes)
    task = task or Quick(chosen, FEATURES, CHUNK, BLOCKS)
    return Trainer(task, chosen, FakeLoader(batch_size), FakeLoader(20), output, ranks=ALONE).run()


def told(output: Path, kind: str = "step") -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith("t_") and key != "seconds"}
        for line in lines
        if line["kind"] == kind
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    train(output)
    return output


def test_a_run_learns_tells_all_its_terms_and_draws_its_pictures(tmp_path: Path) -> None:
    result = as_result(
        train(tmp_path, VqvaeTask(settings(epochs=12), FEATURES, CHUNK, BLOCKS), epochs=12)
    )
    steps, epochs = told(tmp_path), told(tmp_path, "epoch")
    assert {
        "loss",
        "cont",
        "cat",
        "canopy",
        "vq",
        "total",
        "pplx",
        "log2_tokens",
        "usage",
        "pplx_2",
        "dead",
    } <= set(steps[-1])
    assert steps[0]["vq"] == 0, "nothing is quantised before the k-means start"
    assert result["total"] < 0.6 * steps[0]["total"]
    assert result["rmse"]["red"] < 20
    assert result["rmse"].keys() == {"red", "ndvi", "cover"}
    assert {
        "perplexity",
        "usage",
        "accuracy",
        "miou",
        "canopy_mae",
        "checkpoint",
        "t_load_share",
    } <= set(result)
    assert 4 < epochs[-1]["perplexity"] <= 32
    for name in ("curve.png", "sheet.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_same_seed_gives_the_same_run(tmp_path: Path, whole: Path) -> None:
    train(tmp_path)
    assert told(tmp_path) == told(whole)
    one, other = load_checkpoint(tmp_path).tensors, load_checkpoint(whole).tensors
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("stop_at", [0, 1, 2, 8, 11])
def test_a_run_stopped_at_any_step_and_resumed_tells_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, whole: Path, stop_at: int
) -> None:
    class Stopped(Quick):
        def after_step(self, step: int, epoch: int) -> dict[str, float]:
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().after_step(step, epoch)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Stopped(settings(), FEATURES, CHUNK, BLOCKS))
    train(tmp_path, resume=True)
    assert told(tmp_path) == told(whole)
    assert told(tmp_path, "epoch") == told(whole, "epoch")
    one, other = load_checkpoint(tmp_path).tensors, load_checkpoint(whole).tensors
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_kept_average_has_the_codebooks_of_the_model_itself(whole: Path) -> None:
    saved = load_checkpoint(whole)
    model, average = saved.part("model"), saved.part("average")
    books = [name for name in model if name.startswith("quantizer.")]
    assert len(books) > 4
    assert all(torch.equal(model[name], average[name]) for name in books)
    assert not torch.equal(model["stem.weight"], average["stem.weight"])


def test_accumulated_batches_step_like_one_batch_of_their_size(tmp_path: Path) -> None:
    # Chunks of 24, 24 and 12: batches of 12 are halves of those of 24.
    train(tmp_path / "big", batch_size=24, epochs=4, level_dropout=0.5)
    train(tmp_path / "small", batch_size=12, accumulate=2, epochs=4, level_dropout=0.5)
    big, small = (
        [line for line in told(tmp_path / name) if line["step"] <= 4] for name in ("big", "small")
    )
    whole = [
        (one, two)
        for one, two in zip(big, small, strict=True)
        if one["samples"] == two["samples"] == 24
    ]
    assert whole
    assert whole[0][0]["total"] == pytest.approx(whole[0][1]["total"], rel=1e-4)


def test_a_codebook_forced_to_collapse_recovers_in_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Forced(Quick):
        def after_step(self, step: int, epoch: int) -> dict[str, float]:
            figures = super().after_step(step, epoch)
            if step == 20:
                book = self.model.quantizer.books[0]
                book.codes[1:], book.total[1:] = 1e4, 1e4 * book.count[1:, None]
            return figures

    changes = {"epochs": 8, "collapse_steps": 4, "levels": 1}
    train(tmp_path, Forced(settings(**changes), FEATURES, CHUNK, BLOCKS), **changes)
    perplexity = [line["pplx"] for line in told(tmp_path)]
    assert perplexity[21:25] == [1.0] * 4
    assert "collapsed" in caplog.text
    assert np.mean(perplexity[-8:]) > 0.7 * np.mean(perplexity[12:20])


@pytest.mark.parametrize(
    "changes",
    [
        {"quantizer": "fsq", "codebook_size": 64},
        {"window": (5, 4, 4)},
        {"huber": 1.0, "precision": "bf16"},
    ],
)
def test_other_settings_train_and_restore(tmp_path: Path, changes: dict[str, object]) -> None:
    result = train(tmp_path, epochs=1, **changes)
    assert np.isfinite(result["total"])
    codec = restore_vqvae(tmp_path, FEATURES)
    codes = codec.encode(
        BLOCKS["data"][:2, :, : codec.block[1], : codec.block[2]],
        BLOCKS["valid"][:2, :, : codec.block[1], : codec.block[2]],
    )
    assert codes.shape == (2, 2, *codec.grid)


def test_resume_on_other_features_is_refused(tmp_path: Path) -> None:
    train(tmp_path, epochs=1)
    other = VqvaeTask(settings(), FEATURES[:3], CHUNK)
    with pytest.raises(StateError, match="model"):
        train(tmp_path, other, resume=True)


@pytest.mark.parametrize("kind", [KeptChunkSampler, KeptRandomSampler])
def test_samples_left_out_keep_the_others_numbers_and_every_kept_one_comes_once(kind: type) -> None:
    keep = np.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 1], bool)
    sampler = kind([4, 3, 3], 2, keep=keep, seed=1)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(itertools.chain(*batches)) == np.flatnonzero(keep).tolist()
        assert len(batches) == len(sampler)
    if kind is KeptChunkSampler:
        chunks = [
            {int(np.searchsorted([4, 7, 10], number, side="right")) for number in batch}
            for batch in batches
        ]
        assert all(len(chunk) == 1 for chunk in chunks)


def test_with_everything_kept_the_order_is_the_plain_sampler_s() -> None:
    split = FakeSplit([1.0] * 10)
    assert list(make_sampler(split, 2, 0.5, seed=4)) == list(
        ChunkBatchSampler([4, 3, 3], 2, seed=4)
    )
    assert list(make_sampler(split, 4, 0.5, sampling="random", seed=4, interleave=1)) == list(
        RandomBatchSampler([4, 3, 3], 4, seed=4)
    )


def test_the_rule_is_part_of_the_sampler_s_state_and_two_ranks_share_the_epoch() -> None:
    shares = [0.9, 0.1, 0.5, 0.7, 0.2, 0.3, 0.0, 0.6, 1.0, 0.8]
    one, other = make_sampler(FakeSplit(shares), 2, 0.5), make_sampler(FakeSplit(shares), 2, 0.25)
    with pytest.raises(StateError, match="another"):
        other.load_state_dict(one.state_dict())
    ranks = [make_sampler(FakeSplit(shares), 1, 0.5, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(itertools.chain(*itertools.chain(*ranks))) == [0, 2, 3, 7, 8, 9]


def test_no_block_with_enough_valid_voxels_names_the_setting() -> None:
    with pytest.raises(TrainingError, match=r"0\.4 at most; lower --vqvae\.min_valid_share"):
        make_sampler(FakeSplit([0.4] * 10), 2, 0.5)


def test_windows_and_flips_follow_from_seed_epoch_and_sample_alone() -> None:
    whole = cut(BLOCKS, (5, 4, 4), seed=1, epoch=2, flips=True)
    some = [7, 3, 20]
    part = cut(
        {key: value[some] for key, value in BLOCKS.items()}, (5, 4, 4), seed=1, epoch=2, flips=True
    )
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[some], other, rtol=0, atol=0, equal_nan=True)
    assert whole[0].shape == (60, 5, 4, 4, 4)
    later = cut(BLOCKS, (5, 4, 4), seed=1, epoch=3, flips=True)
    assert not torch.equal(whole[1], later[1])


def test_a_window_is_a_part_of_its_block_and_flips_only_move_voxels() -> None:
    data = torch.arange(8 * 320 * 4, dtype=torch.float32).reshape(8, 5, 8, 8, 4)
    batch = {"data": data, "valid": data >= 0, "index": torch.arange(8)}
    windows, _ = cut(batch, (5, 4, 4), seed=1, epoch=0)
    for sample, window in zip(data, windows, strict=True):
        y, x = divmod(int(window[0, 0, 0, 0] - sample[0, 0, 0, 0]) // 4, 8)
        assert torch.equal(window, sample[:, y : y + 4, x : x + 4])
    moved, _ = cut(batch, None, seed=1, epoch=0, flips=True)
    assert torch.equal(
        moved.flatten(2, 3).sort(dim=2).values, data.flatten(2, 3).sort(dim=2).values
    )
    assert sum(not torch.equal(one, other) for one, other in zip(moved, data, strict=True)) >= 4
    assert torch.equal(cut(batch, None)[0], data)


def test_a_share_of_the_samples_is_decoded_from_fewer_levels() -> None:
    index = torch.arange(4000)
    depth = sample_depth(index, 4, 0.5, seed=0, epoch=1)
    assert [int((depth == level).sum()) for level in (1, 2, 3)] == pytest.approx([500] * 3, rel=0.2)
    assert int((depth == 4).sum()) == pytest.approx(2500, rel=0.1)
    assert torch.equal(depth[:7], sample_depth(index[:7], 4, 0.5, seed=0, epoch=1))
    assert sample_depth(index, 1, 0.5, seed=0, epoch=1) is None


def test_a_window_larger_than_the_inner_chunk_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"vqvae\.window"):
        VqvaeTask(settings(window=(5, 16, 16)), FEATURES, CHUNK)
