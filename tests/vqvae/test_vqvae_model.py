"""The VQ-VAE's parts: channels, losses, metrics, model, codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from vqvae_fakes import CLASSES, COVER, FEATURES, NDVI, RED, SHAPE, UNITS, blocks

from utils.training.checkpoint import prefixed, save_checkpoint
from vqvae.compress.codec import restore_vqvae
from vqvae.losses import TERMS, Weights, loss_terms
from vqvae.metrics import Tally, as_result
from vqvae.network.channels import Channels, units
from vqvae.network.layers import depth_to_space, space_to_depth
from vqvae.network.linear_start import linear_start
from vqvae.network.model import VQVAE, Reconstruction, Shape
from warehouse.errors import StateError, TrainingError
from warehouse.layouts.features import Feature


def model(shape: Shape = SHAPE, features: tuple[Feature, ...] = FEATURES) -> VQVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQVAE(features, shape)


def test_truth_is_centred_scaled_masked_and_tells_undeclared_codes_from_declared() -> None:
    data = torch.tensor([120.0, 40.0, float("nan"), 16.0]).expand(1, 1, 1, 2, 4).clone()
    data[0, 0, 0, 1, 1] = 8.0
    truth = Channels(FEATURES).truth(data, torch.ones_like(data, dtype=torch.bool))
    assert truth.values[0, :, 0, 0, 0].tolist() == pytest.approx([30 / UNITS[0], 0.0])
    assert truth.values_mask[0, :, 0, 0, 0].tolist() == [True, False]
    assert truth.classes[0, 0, 0, 0].tolist() == [2, -1], (
        "codes in sorted order -1, 7, 40; 8 is none of them"
    )
    assert float(truth.amounts[0, 0, 0, 0, 0]) == pytest.approx(np.log(2))


def test_continuous_features_are_divided_by_their_range_and_have_a_mean_variance_of_one() -> None:
    assert units([RED, NDVI]) == pytest.approx(UNITS)
    assert units([RED, NDVI])[0] / units([RED, NDVI])[1] == pytest.approx(min(255, 8 * 30) / 2)
    assert np.mean(
        [(each.std / unit) ** 2 for each, unit in zip([RED, NDVI], UNITS, strict=True)]
    ) == pytest.approx(1)
    stray = Feature("dem", "continuous", mean=0.0, std=1.0, minimum=0.0, maximum=1e6)
    flat = Feature("flat", "continuous", mean=3.0, std=0.0)
    assert units([stray]) == pytest.approx([1.0])
    assert units([flat]) == pytest.approx([1e-6])
    assert units([RED, flat, NDVI])[::2] == pytest.approx(UNITS), (
        "a band that never varies changes nothing for the others"
    )


def test_a_perfect_network_gives_the_data_back_in_physical_units() -> None:
    batch, channels = blocks(), Channels(FEATURES)
    truth = channels.truth(batch["data"], batch["valid"])
    logits = functional.one_hot(truth.classes[:, 0].clamp_min(0), 3).movedim(-1, 1).float()
    said = torch.cat(
        [truth.values, logits, torch.where(truth.amounts > 0, 5.0, -5.0), truth.amounts], dim=1
    )
    assert said.shape[1] == channels.outputs
    found = channels.physical(said)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found[batch["valid"]], batch["data"][batch["valid"]], rtol=1e-4, atol=1e-4
    )


def test_reconstructions_stay_inside_the_range_training_showed() -> None:
    said = torch.full((1, Channels(FEATURES).outputs, 1, 1, 1), 1e6)
    assert Channels(FEATURES).physical(said).flatten().tolist() == [255.0, -1.0, 1.0, 100.0]


def test_a_feature_without_training_values_is_refused_by_name() -> None:
    with pytest.raises(TrainingError, match="no valid training voxel: empty"):
        Channels((RED, Feature("empty", "continuous")))


def test_space_to_depth_is_undone_and_keeps_neighbours_together() -> None:
    value = torch.randn(2, 3, 4, 6, 8)
    folded = space_to_depth(value, (2, 3, 4))
    assert folded.shape == (2, 72, 2, 2, 2)
    assert torch.equal(depth_to_space(folded, (2, 3, 4)), value)
    assert torch.equal(
        folded[:, :, 0, 1, 0].sort(dim=1).values,
        value[:, :, :2, 3:6, :4].flatten(1).sort(dim=1).values,
    )


def test_loss_terms_are_the_formulas_by_hand() -> None:
    channels = Channels(FEATURES)
    batch = blocks(3)
    truth = channels.truth(batch["data"], batch["valid"])
    said = torch.randn((3, channels.outputs, 5, 8, 8), generator=torch.Generator().manual_seed(1))
    terms = loss_terms(
        Reconstruction(said, torch.zeros(0), torch.tensor([1.0, 2.0, 3.0])),
        truth,
        channels,
        Weights(0.3, 0.7, 0.25),
    )
    data, valid = batch["data"].numpy(), batch["valid"].numpy()
    voxels = 5 * 8 * 8
    weight = {-1: 100 / 80 / 3, 7: 100 / 10 / 3, 40: 100 / 10 / 3}
    order = [-1, 7, 40]
    for sample in range(3):
        guess = said[sample].double().numpy()
        cont = sum(
            np.where(
                valid[sample, ..., f], ((data[sample, ..., f] - m) / s - guess[row]) ** 2, 0
            ).sum()
            for row, (f, m, s) in enumerate([(0, 90, UNITS[0]), (2, 0.2, UNITS[1])])
        ) / (2 * voxels)
        cat = canopy = 0.0
        for at in np.ndindex(5, 8, 8):
            if valid[(sample, *at, 1)]:
                code = int(data[(sample, *at, 1)])
                logits = guess[2:5][(slice(None), *at)]
                cat -= (
                    weight[code]
                    * (logits[order.index(code)] - np.log(np.exp(logits).sum()))
                    / voxels
                )
            if valid[(sample, *at, 3)]:
                value, logit, amount = data[(sample, *at, 3)], guess[5][at], guess[6][at]
                canopy += (
                    np.log1p(np.exp(-logit if value > 0 else logit))
                    + (value > 0) * (np.log1p(value / 16) - amount) ** 2
                ) / voxels
        found = {name: float(terms[name][sample]) for name in TERMS}
        wanted = {"cont": cont, "cat": cat, "canopy": canopy, "vq": 0.25 * (sample + 1)}
        wanted["total"] = cont + 0.3 * cat + 0.7 * canopy + wanted["vq"]
        assert found == pytest.approx(wanted, rel=1e-4)


def test_what_is_not_valid_changes_neither_codes_nor_loss() -> None:
    net, batch = model().eval(), blocks()
    other = torch.where(batch["valid"], batch["data"], 1e9)
    one, two = (net(data, batch["valid"]) for data in (batch["data"], other))
    assert torch.equal(one.outputs, two.outputs)
    truth = [net.channels.truth(data, batch["valid"]) for data in (batch["data"], other)]
    assert all(torch.equal(a, b) for a, b in zip(*truth, strict=True))


@pytest.mark.parametrize(
    "shape",
    [SHAPE, Shape((5, 8, 8), (5, 8, 8), (1, 4, 4), 16, 1, "fsq", 64, 6, 3)],
    ids=["ema", "fsq, finer patch"],
)
def test_codes_have_the_grid_s_shape_and_decode_to_blocks(shape: Shape) -> None:
    net, batch = model(shape), blocks(40)
    linear_start(net, batch["data"], batch["valid"])
    net.train()
    for step in range(22):
        net(batch["data"], batch["valid"])
        net.quantizer.step(step, 0)
    net.eval()
    codes = net.encode(batch["data"], batch["valid"])
    assert codes.shape == (40, shape.levels, *shape.grid)
    assert codes.dtype == torch.int64
    found = net(batch["data"], batch["valid"])
    assert torch.equal(found.codes, codes)
    decoded = net.decode(codes)
    assert decoded.shape == batch["data"].shape
    torch.testing.assert_close(decoded, net.channels.physical(found.outputs), rtol=1e-3, atol=1e-3)
    assert net.decode(codes[:, :1]).shape == batch["data"].shape
    one = torch.cat(
        [
            net.encode(data[None], valid[None])
            for data, valid in zip(batch["data"], batch["valid"], strict=True)
        ]
    )
    assert torch.equal(one, codes), "a block's codes do not depend on its batch"


def test_the_linear_start_is_principal_component_analysis() -> None:
    net, batch = model(), blocks(200)
    whole = torch.ones_like(batch["valid"])
    data = blocks(200)["data"].nan_to_num(0.0)
    linear_start(net, data, whole)
    truth = net.channels.truth(data, whole)
    rows = (
        space_to_depth(torch.cat([truth.values, truth.amounts], 1), (5, 4, 4))
        .movedim(1, -1)
        .flatten(0, -2)
        .double()
    )
    rows = rows - rows.mean(0)
    parts = torch.linalg.svd(rows, full_matrices=False)[2][:6]
    wanted = rows @ parts.T
    found = net.latent(data, whole).movedim(1, -1).flatten(0, -2).double().detach()
    # Up to the signs of the components and one scale.
    torch.testing.assert_close(
        found.abs() / found.std(), wanted.abs() / wanted.std(), rtol=1e-2, atol=1e-2
    )
    assert float(found.var(0).mean()) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"stride": (2, 4, 4)}, "vqvae.stride"),
        ({"stride": (5, 4, 4), "patch": (5, 3, 4)}, "vqvae.patch"),
    ],
)
def test_strides_that_do_not_fit_are_refused_by_name(
    changes: dict[str, tuple[int, int, int]], where: str
) -> None:
    with pytest.raises(TrainingError, match=where):
        model(Shape((5, 8, 8), **{"stride": (5, 4, 4), "patch": (5, 4, 4)} | changes))


def test_metrics_are_errors_in_physical_units_over_valid_voxels() -> None:
    channels, batch = Channels(FEATURES), blocks(4)
    data, valid = batch["data"], batch["valid"]
    said = torch.randn((4, channels.outputs, 5, 8, 8), generator=torch.Generator().manual_seed(3))
    physical = channels.physical(said)
    found = Reconstruction(said, torch.tensor([0, 1, 2, 3]).view(4, 1, 1, 1, 1), torch.zeros(4))
    tally = Tally(channels, 16, 1, torch.device("cpu"))
    for half in (slice(0, 1), slice(1, 4)):
        part = Reconstruction(*(value[half] for value in found))
        tally.add(
            data[half],
            valid[half],
            physical[half],
            part,
            loss_terms(part, channels.truth(data[half], valid[half]), channels, Weights()),
        )
    figures = as_result(tally.metrics())
    a, b, ok = data.numpy().astype(float), physical.numpy().astype(float), valid.numpy()
    for number, name in ((0, "red"), (2, "ndvi"), (3, "cover")):
        error = (a - b)[..., number][ok[..., number]]
        assert figures["rmse"][name] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert set(figures["rmse"]) == {"red", "ndvi", "cover"}
    assert figures["canopy_mae"] == pytest.approx(
        np.abs((a - b)[..., 3][ok[..., 3]]).mean(), rel=1e-5
    )
    truth, guess = a[..., 1][ok[..., 1]], b[..., 1][ok[..., 1]]
    assert figures["accuracy"] == pytest.approx((truth == guess).mean())
    ious = [
        ((truth == c) & (guess == c)).sum() / ((truth == c) | (guess == c)).sum()
        for c in (-1, 7, 40)
    ]
    assert figures["miou"] == pytest.approx(np.mean(ious))
    assert figures["perplexity"] == pytest.approx(4)
    assert figures["usage"] == 0.25


def checkpoint(folder: Path, net: VQVAE, **changes: object) -> Path:
    save_checkpoint(
        folder, prefixed("average", net.state_dict()), {"model": net.describe() | changes}
    )
    return folder


def test_a_restored_codec_gives_the_model_s_codes_and_blocks(tmp_path: Path) -> None:
    net, batch = model(), blocks(8)
    net.quantizer.books[0].start(torch.randn(64, 6), 0)
    net.quantizer.books[1].start(torch.randn(64, 6), 0)
    codec = restore_vqvae(checkpoint(tmp_path, net), FEATURES)
    codes = codec.encode(batch["data"], batch["valid"])
    assert torch.equal(codes, net.eval().encode(batch["data"], batch["valid"]))
    assert torch.equal(codec.decode(codes), net.decode(codes))
    assert (codec.levels, codec.codebook_size, codec.block, codec.grid) == (
        2,
        16,
        (5, 8, 8),
        (1, 2, 2),
    )
    assert codec.codebook_bytes == 4 * 2 * 16 * 6


@pytest.mark.parametrize(
    ("features", "match"),
    [
        ((RED, CLASSES, NDVI), r"expected cover \(canopy\) as feature 3, found nothing"),
        ((CLASSES, RED, NDVI, COVER), r"expected red \(continuous\) as feature 0, found class"),
        (
            (RED, Feature("class", "categorical", (7, -1), (1, 1)), NDVI, COVER),
            r"class \(categorical \[-1, 7, 40\]\) as feature 1",
        ),
    ],
    ids=["fewer", "another order", "other codes"],
)
def test_a_checkpoint_trained_on_other_features_is_refused(
    tmp_path: Path, features: tuple[Feature, ...], match: str
) -> None:
    with pytest.raises(StateError, match=match):
        restore_vqvae(checkpoint(tmp_path, model()), features)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "tiny"},
        {"features": 3},
        {"width": 10**9},
        {"block": [5, 8]},
        {"quantizer": "x"},
        {"stride": [3, 4, 4]},
    ],
)
def test_a_checkpoint_that_is_no_vqvae_is_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(StateError, match="not of a VQ-VAE"):
        restore_vqvae(checkpoint(tmp_path, model(), **changes))
