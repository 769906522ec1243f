"""Rates, errors and curves of the rate report against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rate_fakes import row_of_blocks

from vqvae.rate.codecs import jpeg2000
from vqvae.rate.codecs.streams import mask_bytes
from vqvae.rate.curves import at_equal_rate, few_rates
from vqvae.rate.distortion import Distortion, entropy_bits
from vqvae.rate.lossless import PACKINGS, class_numbers, lossless_categories
from vqvae.rate.mosaic import Mosaic, filled
from vqvae.rate.plot import draw
from vqvae.rate.seams import seam_steps
from warehouse.layouts.features import Feature


@given(st.lists(st.integers(0, 15), min_size=1, max_size=200))
def test_entropy_is_that_of_the_frequencies(codes: list[int]) -> None:
    expected = -sum(np.log2(codes.count(code) / len(codes)) for code in codes)
    assert entropy_bits(np.array(codes), 16) == pytest.approx(expected, abs=1e-6)


def test_psnr_of_one_full_range_byte_feature_is_the_usual_one() -> None:
    byte = Feature("byte", "continuous", minimum=0.0, maximum=255.0)
    land = Feature("land", "categorical", codes=(4, 2))
    rng = np.random.default_rng(0)
    truth = np.stack([rng.integers(0, 256, 500), rng.choice([2, 4], 500)], axis=-1).astype(
        np.float32
    )
    guess = truth + np.stack([rng.normal(0, 5, 500), np.zeros(500)], axis=-1).astype(np.float32)
    guess[:100, 1] = 4
    valid = rng.random(truth.shape) > 0.1
    errors = Distortion((byte, land))
    errors.add(truth[:200], guess[:200], valid[:200])
    errors.add(truth[200:], guess[200:], valid[200:])
    found, mask = errors.figures(), valid[:, 0]
    mse = float(np.square((guess - truth)[mask, 0].astype(np.float64)).mean())
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / mse))
    assert found["psnr_255"] == pytest.approx(found["psnr"])
    assert found["rmse"] == {"byte": pytest.approx(np.sqrt(mse))}
    one, other = truth[valid[:, 1], 1], guess[valid[:, 1], 1]
    unions = [
        np.mean((one == code) & (other == code)) / np.mean((one == code) | (other == code))
        for code in (2, 4)
    ]
    assert found["miou"] == pytest.approx(np.mean(unions))
    assert found["accuracy"] == pytest.approx(np.mean(one == other))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99))
def test_a_mosaic_gives_its_blocks_back(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = np.stack(np.unravel_index(rng.permutation(2 * 4 * 4)[:count], (2, 4, 4)), axis=1)
    mosaic = Mosaic(grid * np.array([5, 8, 8]), (5, 8, 8), (10, 16, 16))
    blocks = rng.normal(size=(count, 5, 8, 8, 2)).astype(np.float32)
    assert np.array_equal(mosaic.cut(mosaic.lay(blocks)), blocks)


def test_psnr_255_is_of_features_that_are_bytes() -> None:
    ranges = {
        "red": (20.0, 120.0),
        "ndvi": (-1.0, 1.0),
        "share": (0.0, 1.0),
        "height": (0.0, 900.0),
    }
    features = tuple(
        Feature(name, "continuous", minimum=low, maximum=high)
        for name, (low, high) in ranges.items()
    )
    truth = np.full((10, 4), 50, np.float32)
    errors = Distortion(features)
    errors.add(truth, truth + np.array([2, 1, 1, 100], np.float32), np.ones((10, 4), bool))
    assert errors.figures()["psnr_255"] == pytest.approx(10 * np.log10(255**2 / 4))
    assert errors.figures()["psnr"] == pytest.approx(
        -10 * np.log10(np.mean([(2 / 100) ** 2, 0.25, 1, (1 / 9) ** 2]))
    )
    none = Distortion(features[1:])
    none.add(truth[:, 1:], truth[:, 1:], np.ones((10, 3), bool))
    assert none.figures()["psnr_255"] is None


def test_holes_are_filled_from_around_and_values_stay() -> None:
    rows, columns = np.mgrid[0:21, 0:30].astype(np.float32)
    values = np.stack([rows + columns, np.full_like(rows, 7), rows], axis=-1)[None]
    valid = np.ones(values.shape, bool)
    valid[0, 8:12, 10:14, 0] = False
    valid[..., 2] = False
    out = filled(np.where(valid, values, 1e9), valid)
    assert np.array_equal(out[..., :2][valid[..., :2]], values[..., :2][valid[..., :2]])
    assert np.abs(out[0, 8:12, 10:14, 0] - values[0, 8:12, 10:14, 0]).max() < 6, (
        "the plane's slope over the hole, not 1e9"
    )
    assert (out[..., 2] == 0).all(), "nothing is known"


def test_every_lossless_packing_gives_back_what_it_took() -> None:
    rng = np.random.default_rng(0)
    land = Feature("land", "categorical", codes=(40, -2, 17, 5, 9))
    data = rng.choice(np.array(land.codes, np.float32), (4, 5, 32, 32, 1)).repeat(1, axis=-1)
    data[:, :, 8:24] = 17
    valid = rng.random(data.shape) > 0.02
    numbers = class_numbers(data[..., 0], valid[..., 0], land.codes)
    assert np.array_equal(np.sort(land.codes)[numbers][valid[..., 0]], data[..., 0][valid[..., 0]])
    mosaic = row_of_blocks(4)
    laid = mosaic.lay(numbers[..., None])[..., 0]
    found = lossless_categories(
        np.where(valid, data, np.nan).astype(np.float32), valid, [land], mosaic
    )["land"]
    for name, (encode, decode) in PACKINGS.items():
        streams = encode(laid, 5)
        assert len(streams) == 1
        assert np.array_equal(decode(streams, 5, laid.size), laid.reshape(-1)), name
        assert found["packings"][name]["bytes"] == len(streams[0]) + mask_bytes(valid)
    assert (
        found["bits_per_value"]
        == min(8 * size["bytes"] for size in found["packings"].values()) / valid.sum()
    )


def test_categories_of_more_pixels_than_pillow_opens_are_several_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    land = Feature("land", "categorical", codes=(1, 2, 3))
    data = rng.integers(1, 4, (4, 5, 32, 32, 1)).astype(np.float32)
    valid, mosaic = np.ones(data.shape, bool), row_of_blocks(4)
    laid = mosaic.lay(class_numbers(data[..., 0], valid[..., 0], land.codes)[..., None])[..., 0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", laid.size // 3)
    monkeypatch.setattr(jpeg2000, "STREAM_PIXELS", laid.size // 4)
    found = lossless_categories(data, valid, [land], mosaic)["land"]["packings"]
    for name in ("PNG", "JPEG 2000, reversible"):
        encode, decode = PACKINGS[name]
        streams = encode(laid, 3)
        assert len(streams) == 4
        assert np.array_equal(decode(streams, 3, laid.size), laid.reshape(-1)), name
        assert found[name]["bytes"] == sum(map(len, streams)) + mask_bytes(valid)


def test_other_codecs_are_read_at_the_codes_rates() -> None:
    def point(codec: str, rate: float, psnr: float) -> dict[str, Any]:
        return {
            "codec": codec,
            "setting": "s",
            "bits_per_continuous": rate,
            "bits_per_value": rate / 10,
            "psnr": psnr,
            "psnr_255": None,
            "bytes": 1,
        }

    points = [
        point("VQ-VAE", 0.1, 25),
        point("A", 1, 30),
        point("A", 0.01, 20),
        *(point("B", rate, 9) for rate in (1, 2, 3, 4, 5)),
    ]
    assert at_equal_rate(points) == [
        {
            "setting": "s",
            "bits_per_value": 0.01,
            "bits_per_continuous": 0.1,
            "psnr": 25,
            "others": {"A": pytest.approx(25), "B": None},
            "others_per_value": {"A": pytest.approx(20), "B": None},
        }
    ]


def test_codecs_of_fewer_than_five_rates_are_named() -> None:
    points = [
        {"codec": codec}
        for codec, count in (("one", 1), ("four", 4), ("five", 5), ("six", 6))
        for _ in range(count)
    ]
    assert few_rates(points) == {
        "one": "1 rates; other settings do not apply, or need more bytes and err more",
        "four": "4 rates; other settings do not apply, or need more bytes and err more",
    }
    assert few_rates([]) == {}


def test_only_codecs_of_this_report_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    points = [
        {
            "codec": codec,
            "bits_per_continuous": rate,
            "psnr": 20 + 9 * rate,
            "psnr_255": 30.0,
            "bytes": 1,
        }
        for codec in ("VQ-VAE", "other")
        for rate in (0.1, 1.0)
    ]
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *args, **more: figures.append(self) or save(self, *args, **more),
    )
    draw(points, tmp_path / "report.png")
    (figure,) = figures
    assert [[line.get_label() for line in axes.lines] for axes in figure.axes] == [
        ["VQ-VAE", "other"]
    ] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["VQ-VAE", "other"]


def test_curves_are_drawn_with_and_without_byte_features(tmp_path: Path) -> None:
    from PIL import Image

    points = [
        {
            "codec": codec,
            "bits_per_continuous": rate,
            "psnr": 20 + 9 * rate,
            "psnr_255": None,
            "bytes": 1,
        }
        for codec in ("VQ-VAE", "other")
        for rate in (0.1, 1.0)
    ]
    draw(points, tmp_path / "one.png")
    draw([point | {"psnr_255": 30.0} for point in points], tmp_path / "two.png")
    sizes = []
    for name in ("one.png", "two.png"):
        with Image.open(tmp_path / name) as picture:
            sizes.append(picture.width)
    assert sizes[1] > 1.5 * sizes[0]


def test_a_seam_is_a_step_of_the_error_at_borders_only() -> None:
    feature = (Feature("red", "continuous", minimum=0.0, maximum=1.0),)
    origins = np.array([[0, 0, 0], [0, 0, 8], [0, 8, 0], [0, 8, 8]])
    mosaic = Mosaic(origins, (2, 8, 8), (2, 16, 16))
    truth = np.zeros((4, 2, 8, 8, 1), np.float32)
    valid = np.ones(truth.shape, bool)
    ramp = (np.arange(8) / 100).astype(np.float32)[:, None]
    steps = seam_steps(mosaic, truth, truth + ramp[None, None, None], valid, feature)
    assert steps["x"]["border"] == pytest.approx(0.07, rel=1e-3)
    assert steps["x"]["inside"] == pytest.approx(0.01, rel=1e-3)
    assert "y" not in steps, "no error changes along y: nothing to compare"
