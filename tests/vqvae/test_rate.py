"""Rates and errors against plain arithmetic; other codecs keep what they promise.

What is not installed is said.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqvae.rate import baselines, rate_report
from vqvae.rate.baselines import absent_baselines, baseline_points
from vqvae.rate.codecs import base, error_bounded, jpeg2000
from vqvae.rate.codecs.base import (
    Blocks,
    Coded,
    Encoded,
    RateCodec,
    Sample,
    Setting,
    coded_points,
    encode_and_decode,
    front,
)
from vqvae.rate.codecs.error_bounded import Sz3, Zfp
from vqvae.rate.codecs.jpeg2000 import Jpeg2000, encode_planes, qualities
from vqvae.rate.codecs.pca import components
from vqvae.rate.codecs.registry import CODECS
from vqvae.rate.codecs.rounding import round_mantissa
from vqvae.rate.codecs.streams import mask_bytes, zstd_pack, zstd_unpack
from vqvae.rate.curves import at_equal_rate, few_rates
from vqvae.rate.distortion import Distortion, entropy_bits
from vqvae.rate.lossless import PACKINGS, class_numbers, lossless_categories
from vqvae.rate.markdown import table_of
from vqvae.rate.mosaic import Mosaic, filled
from vqvae.rate.plot import draw
from vqvae.rate.seams import seam_steps
from warehouse.layouts.features import Feature


def landscape(seed: int = 0, blocks: int = 8) -> np.ndarray:
    """float32 [blocks, 5, 32, 32, 3].

    Waves that three features and five dates share, and a little noise.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32] / 32
    field = np.sin(6 * y[None, None] + rng.uniform(0, 6, (blocks, 5, 1, 1))) * np.cos(5 * x) / 4
    values = np.stack([field, 0.8 * field, -0.5 * field], axis=-1).astype(np.float32)
    return values + rng.normal(0, 0.01, values.shape).astype(np.float32)


def row_of_blocks(count: int) -> Mosaic:
    return Mosaic(
        np.stack([np.zeros(count, int), np.zeros(count, int), np.arange(count) * 32], axis=1),
        (5, 32, 32),
        (5, 32, 32 * count),
    )


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


@pytest.fixture(scope="module")
def curves() -> dict[str, list[Coded]]:
    """Every codec on the landscape, a tenth of it missing."""
    values = landscape()
    valid = np.random.default_rng(1).random(values.shape) > 0.1
    blocks = Blocks(np.where(valid, values, 0), valid, row_of_blocks(8))
    out: dict[str, list[Coded]] = {}
    for coded in baseline_points(blocks, blocks):
        assert coded.guess.shape == values.shape
        out.setdefault(coded.codec, []).append(coded)
    return out


def error_of(coded: Coded) -> float:
    values = landscape()
    valid = np.random.default_rng(1).random(values.shape) > 0.1
    return float(np.square((coded.guess - values)[valid]).mean())


def test_baselines_spend_more_bits_for_less_error(curves: dict[str, list[Coded]]) -> None:
    for name, curve in curves.items():
        sizes, errors = zip(*sorted((coded.bytes, error_of(coded)) for coded in curve), strict=True)
        assert all(
            later <= earlier * 1.05 + 1e-9 for earlier, later in itertools.pairwise(errors)
        ), (name, sizes, errors)
        assert sizes[0] > mask_bytes(np.random.default_rng(1).random((8, 5, 32, 32, 3)) > 0.1), (
            "every codec is charged the holes"
        )
    assert min(map(error_of, curves["PCA over features + JPEG 2000"])) < 10**-3.3
    assert all(coded.apart for name, curve in curves.items() for coded in curve if "PCA" in name)


def test_every_codec_has_five_rates(curves: dict[str, list[Coded]]) -> None:
    assert {
        "ZFP",
        "SZ3",
        "JPEG 2000",
        "PCA over features + JPEG 2000",
        "int8 + zstd",
        "bit rounding + zstd",
        "float16, mantissa rounded, + zstd",
    } < set(curves)
    assert {name: len(curve) for name, curve in curves.items() if len(curve) < 5} == {}


def test_integers_are_half_a_step_off_at_most(curves: dict[str, list[Coded]]) -> None:
    values = landscape()
    valid = np.random.default_rng(1).random(values.shape) > 0.1
    values = np.where(valid, values, 0)
    for coded in curves["int8 + zstd"]:
        steps = int(coded.setting.split()[0]) - 1
        width = values.max(axis=(0, 1, 2, 3)) - values.min(axis=(0, 1, 2, 3))
        assert (
            np.abs(coded.guess - values).max(axis=(0, 1, 2, 3)) <= width / steps / 2 * 1.001
        ).all()


@pytest.mark.parametrize(("dtype", "whole"), [(np.float16, 10), (np.float32, 23)])
@pytest.mark.parametrize("bits", [0, 2, 5])
def test_rounding_keeps_the_nearest_number_of_so_many_bits(
    dtype: Any, whole: int, bits: int
) -> None:
    values = np.random.default_rng(0).normal(0, 1, 2000).astype(dtype)
    fraction, exponent = np.frexp(values.astype(np.float64))
    step = 2.0 ** (bits + 1)
    found, nearest = (
        round_mantissa(values, bits).astype(np.float64),
        np.ldexp(np.round(fraction * step) / step, exponent),
    )
    # Of two equally near, the one whose next bit is 0, which without a mantissa is one of the
    # exponent's.
    assert np.array_equal(np.abs(found - values), np.abs(nearest - values))
    assert (np.frexp(found)[0] * step % 1 == 0).all()
    assert np.array_equal(round_mantissa(values, whole), values)


def test_sz3_and_zfp_hold_their_bounds_and_count_their_streams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pysz
    import zfpy

    laid = row_of_blocks(2).lay(landscape(blocks=2))
    monkeypatch.setattr(
        base, "front", lambda makers, truth, mask: iter([make() for make in makers])
    )
    values = landscape(blocks=2)
    blocks = Blocks(values, np.ones(values.shape, bool), row_of_blocks(2))
    sample = Sample(blocks, blocks)
    shapes = {"2D": (3 * 5 * 32, 64), "3D": (15, 32, 64), "4D": (3, 5, 32, 64)}
    flat = np.ascontiguousarray(laid.transpose(3, 0, 1, 2))
    seen = 0
    for coded in coded_points(Zfp(), sample):
        layout, tolerance = coded.setting.split(", tolerance ")
        assert np.abs(coded.guess - values).max() <= float(tolerance)
        stream = zfpy.compress_numpy(flat.reshape(shapes[layout]), tolerance=float(tolerance))
        assert coded.bytes == len(stream)
        again = zfpy.decompress_numpy(stream).reshape(flat.shape).transpose(1, 2, 3, 0)
        assert np.array_equal(row_of_blocks(2).cut(again), coded.guess)
        seen += 1
    kinds = {"interpolation": 2, "interpolation or Lorenzo": 1, "Lorenzo and regression": 0}
    for coded in coded_points(Sz3(), sample):
        layout, kind, bound = coded.setting.split(", ")
        asked = float(bound.split()[1])
        assert np.abs(coded.guess - values).max() <= asked * 1.0001
        config = pysz.szConfig(*shapes[layout])
        config.errorBoundMode, config.absErrorBound, config.cmprAlgo = (
            pysz.szErrorBoundMode.ABS,
            asked,
            kinds[kind],
        )
        assert coded.bytes == len(pysz.sz.compress(flat.reshape(shapes[layout]), config)[0])
        seen += 1
    assert seen == 3 * len(error_bounded.TOLERANCES) + 4 * len(error_bounded.BOUNDS)


def streams_of(laid: np.ndarray, basis: np.ndarray) -> Iterator[tuple[Coded, list[bytes]]]:
    for setting in qualities(basis):
        streams = list(Jpeg2000().encode(laid, setting).streams)
        yield encode_and_decode(Jpeg2000(), "J", laid, setting), streams


def test_jpeg_2000_counts_its_streams_and_long_stacks_are_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    laid = row_of_blocks(4).lay(landscape(blocks=4))
    basis = components(laid.transpose(1, 2, 0, 3).reshape(-1, 15))
    whole = list(streams_of(laid, basis))
    monkeypatch.setattr(jpeg2000, "STREAM_PIXELS", 15 * 32 * 128 // 3)
    cut = list(streams_of(laid, basis))
    for (one, streams), (other, parts) in zip(whole, cut, strict=True):
        assert one.bytes == len(streams[0])
        assert all(stream.startswith(bytes.fromhex("ff4fff51")) for stream in streams + parts), (
            "raw codestreams, no boxes"
        )
        assert len(parts) == 3
        assert other.bytes == sum(map(len, parts))
    # The target is an error over the streams' numbers, which an orthonormal basis leaves alone.
    for (coded, _), quality in zip(whole, jpeg2000.QUALITIES, strict=True):
        assert -10 * np.log10(np.square(coded.guess - laid).mean()) > quality - 3


def test_one_stream_for_all_components_beats_one_each_of_equal_error() -> None:
    """What equal errors a component cost: components of unlike structure have unlike slopes."""
    laid = row_of_blocks(8).lay(landscape())
    basis = components(laid.reshape(-1, 3))
    planes = np.ascontiguousarray((laid @ basis).transpose(3, 0, 1, 2)).reshape(
        3, -1, laid.shape[2]
    )
    scale = 32_767 / float(np.abs(planes).max())
    setting = next(each for each in qualities(basis) if each.label == "32 dB")
    one = encode_and_decode(Jpeg2000(), "J", laid, setting)
    error = float(np.square(one.guess - laid).mean())
    apart = [
        encode_planes(plane[None], scale, -10 * np.log10(error))
        for plane in planes
        if np.square(plane).mean() > error
    ]
    assert one.bytes < sum(map(len, apart))


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=12))
def test_a_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    truth, valid = np.zeros((2, 2), np.float32), np.array([[True, False], [True, True]])
    made = [
        Coded("c", str(at), size, np.where(valid, np.sqrt(error), 99).astype(np.float32), 0, 0)
        for at, (size, error) in enumerate(points)
    ]
    found = {
        (coded.bytes, points[int(coded.setting)][1])
        for coded in front([lambda each=each: each for each in made], truth, valid)
    }
    beaten = {
        (a, b) for a, b in points for c, d in points if c <= a and d <= b and (c, d) != (a, b)
    }
    assert found == set(points) - beaten


def test_zstd_streams_give_the_array_back() -> None:
    rng = np.random.default_rng(0)
    for dtype, shape in ((np.int8, (300, 4, 5, 6)), (np.float32, (2, 3, 4, 4, 3))):
        values = rng.normal(0, 20, shape).astype(dtype)
        assert np.array_equal(zstd_unpack(zstd_pack(values), dtype, shape), values)


def test_a_codec_is_a_class_in_the_list_of_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(RateCodec[Setting]):
        name = "float16 alone"

        def settings(self, train: Blocks, values: np.ndarray) -> list[Setting]:
            return [Setting("16 bits", 0)]

        def encode(self, values: np.ndarray, setting: Setting) -> Encoded:
            return Encoded([values.astype(np.float16).tobytes()])

        def decode(self, encoded: Encoded, setting: Setting, shape: tuple[int, ...]) -> np.ndarray:
            return np.frombuffer(encoded.streams[0], np.float16).reshape(shape).astype(np.float32)

    values = landscape(blocks=2)
    blocks = Blocks(values, np.ones(values.shape, bool), row_of_blocks(2))
    monkeypatch.setattr(baselines, "CODECS", (Half(),))
    (point,) = baseline_points(blocks, blocks)
    assert (point.codec, point.setting) == ("float16 alone", "16 bits")
    assert point.bytes == 2 * values.size + mask_bytes(blocks.valid)
    assert np.allclose(point.guess, values, atol=1e-3)


def test_no_two_codecs_share_a_name() -> None:
    assert len({codec.name for codec in CODECS}) == len(CODECS)


def test_what_is_not_installed_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import features

    values = landscape(blocks=2)
    blocks = Blocks(values, np.ones(values.shape, bool), row_of_blocks(2))
    assert absent_baselines(blocks, blocks) == {}, "the tests have all of them"
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in {"zfpy", "pysz"} else find(name, *rest),
    )
    monkeypatch.setattr(features, "check_codec", lambda name: False)
    absent = absent_baselines(blocks, blocks)
    assert set(absent) == {"ZFP", "SZ3", "JPEG 2000"}
    assert "tensor-warehouse[codecs]" in absent["ZFP"]
    names = {coded.codec for coded in baseline_points(blocks, blocks)}
    assert not any("JPEG" in name or name in {"ZFP", "SZ3"} for name in names)
    report: dict[str, Any] = {
        "blocks": 2,
        "split": "val",
        "byte_features": [],
        "points": [],
        "at_equal_rate": [],
        "absent": absent,
        "few_rates": {},
        "lossless_categories": {},
        "seams": {},
        "codec_bytes": {},
        "numbering_bytes": 0,
        "threads": 1,
    }
    assert "* ZFP: not measured, the package zfpy is not installed" in table_of(report)


def test_a_basis_over_dates_that_cannot_be_learnt_is_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "PCA over features and dates + JPEG 2000"

    def blocks(edge: int = 32, first_date: int = 0) -> Blocks:
        values = np.ascontiguousarray(landscape(blocks=2)[:, :, :edge, :edge])
        origins = np.array([[first_date, 0, at * edge] for at in range(2)])
        return Blocks(
            values,
            np.ones(values.shape, bool),
            Mosaic(origins, (5, edge, edge), (5, edge, edge * 2)),
        )

    def without_jpeg_2000(codec: RateCodec[Any], sample: Sample) -> Iterator[Coded]:
        if not isinstance(codec, Jpeg2000):
            return coded_points(codec, sample)
        return iter([Coded(codec.name, "", 1, sample.held.values, 0, 0)])

    def left_out(train: Blocks, held: Blocks) -> str | None:
        absent = absent_baselines(train, held)
        assert set(absent) <= {name}
        monkeypatch.setattr(baselines, "coded_points", without_jpeg_2000)
        assert (name in absent) != (name in {coded.codec for coded in baseline_points(train, held)})
        return absent.get(name)

    assert left_out(blocks(), blocks()) is None
    assert (
        left_out(blocks(first_date=5), blocks())
        == "the training and the held-out blocks drawn are not of the same dates"
    )
    assert (
        left_out(blocks(edge=2), blocks())
        == "8 training pixels have all dates, and 15 components want more than 30"
    )
    monkeypatch.setattr(jpeg2000, "MOST_COMPONENTS", 14)
    assert (
        left_out(blocks(), blocks())
        == "dates x features are 15 components, and a basis of more than 14 takes minutes"
    )
    monkeypatch.setattr(jpeg2000, "missing_openjpeg", lambda: "not here")
    assert absent_baselines(blocks(), blocks()) == {"JPEG 2000": "not here"}, "one reason is enough"


def test_the_report_says_what_other_dates_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    features = tuple(Feature(name, "continuous", minimum=0.0, maximum=1.0) for name in "abc")
    data, later = landscape(blocks=2), np.array([[5, 0, 0], [5, 0, 32]])
    monkeypatch.setattr(rate_report, "drawn", lambda *_: (data, np.ones(data.shape, bool), later))
    monkeypatch.setattr(rate_report, "baseline_points", lambda *_: iter(()))
    cube: Any = SimpleNamespace(
        cube=SimpleNamespace(layout=SimpleNamespace(inner=(5, 32, 32), block=(5, 32, 64)))
    )
    points, absent = rate_report.other_points(
        cube, data, np.ones(data.shape, bool), features, row_of_blocks(2), 2
    )
    assert (points, list(absent)) == ([], ["PCA over features and dates + JPEG 2000"])
    land = (Feature("land", "categorical", codes=(1, 2)),)
    assert rate_report.other_points(
        cube, data, np.ones(data.shape, bool), land, row_of_blocks(2), 2
    ) == ([], {})


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
