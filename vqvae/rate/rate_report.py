"""The rate-distortion report: the codes of held-out blocks at several rates, beside other codecs.

report.json has every point, report.md the tables, report.png the curves. There are two measures of
rate, so that nothing is hidden: `bits_per_value` is over the valid values of the features a codec
holds (the codes hold all, other codecs the continuous ones), `bits_per_continuous` charges the
codes of all features to the continuous values alone. Curves are drawn over the second, which is the
harder one for the codes. A codec that is not installed, or that has fewer than five rates, is named
with the reason. Memory: the held-out blocks, at most `report_samples`, about ten times over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray

from vqvae.compress.blocks import CubePart, read_blocks
from vqvae.compress.codec import CubeCodec
from vqvae.compress.decode import CodesOfCube
from vqvae.rate.baselines import absent_baselines, baseline_points
from vqvae.rate.code_points import code_points
from vqvae.rate.codecs.base import Blocks, Coded
from vqvae.rate.curves import at_equal_rate, few_rates
from vqvae.rate.distortion import Distortion, feature_ranges, is_byte
from vqvae.rate.lossless import lossless_categories
from vqvae.rate.markdown import table_of
from vqvae.rate.mosaic import Mosaic
from vqvae.rate.plot import draw
from vqvae.rate.points import RatePoint, RateReport
from vqvae.rate.seams import seam_steps
from vqvae.settings import CompressSettings
from warehouse.errors import BuildError
from warehouse.format import durable
from warehouse.layouts.features import Feature
from warehouse.read.version import Warehouse
from warehouse.settings import SPLIT_NAMES

__all__ = ["ReportResult", "write_report"]

TRAIN_SAMPLES = 1024
"""Training blocks that bases are fitted on, at most."""

Values = NDArray[np.float32]
Draw = tuple[Values, NDArray[np.bool_], NDArray[np.int64]]
"""data, valid [n, T, Y, X, F] and origins [n, 3] of blocks."""


class ReportResult(TypedDict):
    """What the command adds to its result. report: path of report.md."""

    points: list[RatePoint]
    psnr: float | None
    seams: dict[str, dict[str, float]]
    report: str


def write_report(
    cube: Warehouse, codes: Path, settings: CompressSettings, folder: Path
) -> ReportResult:
    """Measure a version of codes on held-out blocks, and write the report.

    Parameters
    ----------
    cube
        The cube that was encoded.
    codes
        Folder of the version of codes.
    settings
        checkpoint, device, report_samples and shard_samples are used.
    folder
        Where report.json, report.md and report.png go.

    Raises
    ------
    BuildError
        The folder cannot be written.
    """
    version = CodesOfCube(codes, settings.checkpoint, device=settings.device)
    layout, features = version.cube.layout, version.cube.features
    split = next(name for name in ("val", "test", "train") if name in cube.splits)
    held = drawn(cube, split, settings.report_samples)
    data, valid, origins = held
    mosaic = Mosaic(origins, layout.inner, layout.block)

    points, guess = code_points(version, cube, held, settings.shard_samples)
    seams = seam_steps(mosaic, data, guess, valid, features)

    most = min(settings.report_samples, TRAIN_SAMPLES)
    others, absent = other_points(cube, data, valid, features, mosaic, most)
    points += others

    values, continuous = _counts(features, valid)
    _add_rates(points, values, continuous)

    report: RateReport = {
        "split": split,
        "blocks": len(data),
        "continuous_values": continuous,
        "values": values,
        "ranges": ranges_of(features),
        "byte_features": [feature.name for feature in features if is_byte(feature)],
        "points": points,
        "at_equal_rate": at_equal_rate(points),
        "absent": absent,
        "few_rates": few_rates(points),
        "seams": seams,
        "lossless_categories": lossless_categories(data, valid, features, mosaic),
        "checkpoint": version.warehouse.manifest.recipe["checkpoint"],
        "codec_bytes": _codec_bytes(version.codec),
        "numbering_bytes": len(json.dumps(version.rows.tolist())),
        # Seconds say nothing without it.
        "threads": torch.get_num_threads(),
    }
    _write(report, folder)
    path = str(folder / "report.md")
    return {"points": points, "psnr": points[0]["psnr"], "seams": seams, "report": path}


def _codec_bytes(codec: CubeCodec) -> dict[str, int]:
    # Beside the rates and not in them: one decoder serves any number of cubes.
    return {"decoder": codec.decoder_bytes, "codebook": codec.codebook_bytes}


def _write(report: RateReport, folder: Path) -> None:
    try:
        durable.write_bytes(folder / "report.json", json.dumps(report, indent=1).encode())
        durable.write_bytes(folder / "report.md", table_of(report).encode())
        draw(report["points"], folder / "report.png")
    except OSError as error:
        raise BuildError(
            "the report cannot be written",
            where=folder,
            found=error.strerror,
            remedy="choose another --compress.report",
        ) from None


def _add_rates(points: Sequence[RatePoint], values: int, continuous: int) -> None:
    """Add bits a value to the points, over what each codec holds and over the continuous ones."""
    for point in points:
        bits = 8 * point["bytes"]
        held_values = values if point["all_features"] else continuous
        point["bits_per_value"] = bits / max(1, held_values)
        point["bits_per_continuous"] = bits / max(1, continuous)


def _counts(features: Sequence[Feature], valid: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the valid values of all features and of the continuous ones."""
    count = valid.sum(axis=(0, 1, 2, 3))
    continuous = [feature.kind == "continuous" for feature in features]
    return int(count.sum()), int(count[continuous].sum())


def ranges_of(features: Sequence[Feature]) -> dict[str, float]:
    """Return the training range of each continuous feature, in physical units."""
    return {
        feature.name: float(size)
        for feature, size in zip(features, feature_ranges(features), strict=True)
        if feature.kind == "continuous"
    }


def drawn(cube: Warehouse, split: str, most: int) -> Draw:
    """Read up to `most` samples of a split, the same ones on every call.

    They fill label blocks one after the other, in a fixed random order: codecs of
    images need neighbours, which single samples would not have.
    """
    assert cube.cube is not None
    part = CubePart(cube, SPLIT_NAMES.index(split))
    origins = part.sample_index.origins(np.arange(len(part)))

    block = np.array(cube.cube.layout.block[1:])
    _, number = np.unique(origins[:, 1:] // block, axis=0, return_inverse=True)
    order = np.random.default_rng(0).permutation(int(number.max()) + 1)
    chosen = np.sort(np.argsort(order[number.reshape(-1)], kind="stable")[:most])

    data, valid = read_blocks(part, part.reader(), chosen)
    return data, valid, origins[chosen]


def other_points(
    cube: Warehouse,
    data: Values,
    valid: NDArray[np.bool_],
    features: Sequence[Feature],
    mosaic: Mosaic,
    most: int,
) -> tuple[list[RatePoint], dict[str, str]]:
    """Measure the other codecs on the continuous features.

    Parameters
    ----------
    cube
        Where up to `most` training blocks are drawn from.
    data, valid
        float32 and bool [N, T, Y, X, F], held-out blocks in physical units.
    features
        The cube's features.
    mosaic
        Where the held-out blocks lie.

    Returns
    -------
    tuple
        The points, without their rates, and the codecs left out with the
        reason for each.
    """
    some = [index for index, feature in enumerate(features) if feature.kind == "continuous"]
    if not some:
        return [], {}

    ranges = feature_ranges(features)[some].astype(np.float32)
    means = np.array([features[index].mean or 0.0 for index in some], np.float32)

    def scaled_blocks(values: Values, mask: NDArray[np.bool_], laid: Mosaic) -> Blocks:
        # Over the range, so that a codec that minimises the mean square error minimises what is
        # reported.
        scaled = (values[..., some] - means) / ranges
        known = mask[..., some]
        return Blocks(np.where(known, scaled, 0).astype(np.float32), known, laid)

    train, train_valid, origins = drawn(cube, "train", most)
    assert cube.cube is not None
    layout = cube.cube.layout
    learned = scaled_blocks(train, train_valid, Mosaic(origins, layout.inner, layout.block))
    held = scaled_blocks(data, valid, mosaic)

    points = []
    for coded in baseline_points(learned, held):
        errors = Distortion([features[index] for index in some])
        errors.add(data[..., some], coded.guess * ranges + means, valid[..., some])
        points.append(_point(coded, errors))
    return points, absent_baselines(learned, held)


def _point(coded: Coded, errors: Distortion) -> RatePoint:
    return {
        "codec": coded.codec,
        "setting": coded.setting,
        "levels": 0,
        "all_features": False,
        "bytes": coded.bytes,
        "bytes_apart": coded.apart,
        **errors.figures(),
        "encode_seconds": coded.encode_seconds,
        "decode_seconds": coded.decode_seconds,
    }
