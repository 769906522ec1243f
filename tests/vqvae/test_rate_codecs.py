"""The codecs of the rate report: they hold their bounds and count all of their bytes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rate_fakes import landscape, row_of_blocks

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
from vqvae.rate.markdown import table_of
from vqvae.rate.mosaic import Mosaic
from warehouse.layouts.features import Feature


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
