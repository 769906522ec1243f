"""The rate-distortion report: the codes of a cube's held-out blocks at several rates, beside other
codecs on the same values.

report.json has every point, report.md the tables, report.png the curves. Two abscissas, so that
nothing is hidden: `bits_per_value` is over the valid values of the features a codec holds (the
codes hold all, other codecs the continuous ones), `bits_per_continuous` charges the codes of all
features to the continuous values alone. Curves are drawn over the second, which is the harder one
for the codes. A codec that is not installed, or that has fewer than five rates, is named with the
reason. Memory: the held-out blocks, at most `report_samples`, about ten times over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vqvae.compress.blocks import CubePart
from vqvae.compress.reconstruct import CodesOfCube
from vqvae.rate.baselines import Blocks, absent_baselines, baseline_points
from vqvae.rate.code_points import code_points
from vqvae.rate.lossless import lossless_categories
from vqvae.rate.measure import Distortion, feature_ranges, is_byte
from vqvae.rate.mosaic import Mosaic
from vqvae.rate.plot import OURS, draw
from vqvae.settings import CompressSettings
from warehouse.errors import BuildError
from warehouse.format import durable
from warehouse.read.version import Warehouse
from warehouse.settings import SPLIT_NAMES

__all__ = ["at_equal_rate", "few_rates", "seam_steps", "write_report"]

TRAIN_SAMPLES = 1024
"""Training blocks that bases are fitted on, at most."""
FEWEST_RATES = 5
Draw = tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]


def write_report(
    cube: Warehouse, codes: Path, settings: CompressSettings, folder: Path
) -> dict[str, Any]:
    """Write the report; {points, psnr, seams, report}.

    Raises BuildError when the folder cannot be written.
    """
    version = CodesOfCube(codes, settings.checkpoint, device=settings.device)
    layout, features = version.cube.layout, version.cube.features
    split = next(name for name in ("val", "test", "train") if name in cube.splits)
    data, valid, origins = drawn(cube, split, settings.report_samples)
    truth = np.where(valid, data, 0)
    facts = Distortion(features)
    facts.add(truth, truth, valid)
    held, every = facts.values, int(facts.count.sum())
    mosaic = Mosaic(origins, layout.inner, layout.block)
    points, guess = code_points(version, cube, (data, valid, origins), settings.shard_samples)
    best = points[0]
    seams = seam_steps(mosaic, data, guess, valid, features)
    others, absent = other_points(
        cube,
        data,
        valid,
        features,
        mosaic,
        facts.continuous,
        min(settings.report_samples, TRAIN_SAMPLES),
    )
    points += others
    for point in points:
        point["bits_per_value"] = (
            8 * point["bytes"] / max(1, every if point["all_features"] else held)
        )
        point["bits_per_continuous"] = 8 * point["bytes"] / max(1, held)
    report = {
        "split": split,
        "blocks": len(data),
        "continuous_values": held,
        "values": every,
        "ranges": ranges_of(features),
        "byte_features": [feature.name for feature in features if is_byte(feature)],
        "points": points,
        "at_equal_rate": at_equal_rate(points),
        "absent": absent,
        "few_rates": few_rates(points),
        "seams": seams,
        "lossless_categories": lossless_categories(data, valid, features, mosaic),
        "checkpoint": version.warehouse.manifest.recipe["checkpoint"],
        "codec_bytes": {
            "decoder": version.codec.decoder_bytes,
            "codebook": version.codec.codebook_bytes,
        },
        "numbering_bytes": len(json.dumps(version.rows.tolist())),
        "threads": torch.get_num_threads(),
    }
    try:
        durable.write_bytes(folder / "report.json", json.dumps(report, indent=1).encode())
        durable.write_bytes(folder / "report.md", table_of(report).encode())
        draw(points, folder / "report.png")
    except OSError as error:
        raise BuildError(
            "the report cannot be written",
            where=folder,
            found=error.strerror,
            remedy="choose another --compress.report",
        ) from None
    return {
        "points": points,
        "psnr": best["psnr"],
        "seams": seams,
        "report": str(folder / "report.md"),
    }


def ranges_of(features: Any) -> dict[str, float]:
    return {
        feature.name: float(size)
        for feature, size in zip(features, feature_ranges(features), strict=True)
        if feature.kind == "continuous"
    }


def drawn(cube: Warehouse, split: str, most: int) -> Draw:
    """(data, valid, origins) of up to `most` samples of a split.

    Of whole label blocks, drawn in a fixed random order.
    """
    assert cube.cube is not None
    part = CubePart(cube, SPLIT_NAMES.index(split))
    origins = part.places.origins(np.arange(len(part)))
    _, number = np.unique(
        origins[:, 1:] // np.array(cube.cube.layout.block[1:]), axis=0, return_inverse=True
    )
    order = np.random.default_rng(0).permutation(int(number.max()) + 1)
    chosen = np.sort(np.argsort(order[number.reshape(-1)], kind="stable")[:most])
    out: dict[str, NDArray[Any]] = {
        name: np.empty((len(chosen), *spec.shape[1:]), spec.dtype)
        for name, spec in part.specs.items()
    }
    part.reader().fill(list(out), chosen, out)
    return out["data"], out["valid"], origins[chosen]


def other_points(
    cube: Warehouse,
    data: NDArray[np.float32],
    valid: NDArray[np.bool_],
    features: Any,
    mosaic: Mosaic,
    some: list[int],
    most: int,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The baselines, on continuous features, and those left out with the reason."""
    if not some:
        return [], {}
    ranges = feature_ranges(features)[some].astype(np.float32)
    means = np.array([features[at].mean or 0.0 for at in some], np.float32)

    def scaled(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        out: NDArray[np.float32] = np.where(
            mask[..., some], (values[..., some] - means) / ranges, 0
        ).astype(np.float32)
        return out

    def blocks(values: NDArray[np.float32], mask: NDArray[np.bool_], laid: Mosaic) -> Blocks:
        return Blocks(scaled(values, mask), mask[..., some], laid)

    train, train_valid, origins = drawn(cube, "train", most)
    assert cube.cube is not None
    layout = cube.cube.layout
    points = []
    learnt, held = (
        blocks(train, train_valid, Mosaic(origins, layout.inner, layout.block)),
        blocks(data, valid, mosaic),
    )
    for coded in baseline_points(learnt, held):
        errors = Distortion([features[at] for at in some])
        errors.add(data[..., some], coded.guess * ranges + means, valid[..., some])
        points.append(
            {
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
        )
    return points, absent_baselines(learnt, held)


def at_equal_rate(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each point of the codes, every other codec's PSNR at its rate: {setting, bits_per_value,
    bits_per_continuous, psnr, others: {codec: dB} at bits_per_continuous, others_per_value: at
    bits_per_value}; interpolated along log(rate), None outside."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point["codec"] != OURS and point["psnr"] is not None:
            curves.setdefault(point["codec"], []).append(
                (point["bits_per_continuous"], point["psnr"])
            )

    def heights(rate: float) -> dict[str, float | None]:
        row: dict[str, float | None] = {}
        for name, curve in curves.items():
            rates, decibels = zip(*sorted(curve), strict=True)
            row[name] = (
                float(np.interp(np.log(rate), np.log(rates), decibels))
                if rates[0] <= rate <= rates[-1]
                else None
            )
        return row

    kept = ("setting", "bits_per_value", "bits_per_continuous", "psnr")
    return [
        {key: point[key] for key in kept}
        | {
            "others": heights(point["bits_per_continuous"]),
            "others_per_value": heights(point["bits_per_value"]),
        }
        for point in points
        if point["codec"] == OURS and point["psnr"] is not None
    ]


def few_rates(points: list[dict[str, Any]]) -> dict[str, str]:
    """Codecs with fewer than five rates, and why."""
    counts: dict[str, int] = {}
    for point in points:
        counts[point["codec"]] = counts.get(point["codec"], 0) + 1
    why = "other settings do not apply, or need more bytes and err more"
    return {name: f"{count} rates; {why}" for name, count in counts.items() if count < FEWEST_RATES}


def seam_steps(
    mosaic: Mosaic,
    data: NDArray[np.float32],
    guess: NDArray[np.float32],
    valid: NDArray[np.bool_],
    features: Any,
) -> dict[str, dict[str, float]]:
    """Mean absolute step of the reconstruction error between neighbouring voxels, {axis: {border,
    inside, ratio}}.

    border: across inner chunks, which decode without knowing each other; inside: within one. Errors
    over the features' ranges, continuous ones only. A ratio of 1 is no seam.
    """
    some = [at for at, feature in enumerate(features) if feature.kind == "continuous"]
    ranges = feature_ranges(features)[some].astype(np.float32)
    known = valid[..., some]
    error = mosaic.lay(
        np.where(known, (guess[..., some] - data[..., some]) / ranges, np.nan).astype(np.float32),
        np.nan,
    )
    out = {}
    for axis, name in enumerate(("time", "y", "x")):
        step = np.abs(np.diff(error, axis=axis))
        at = np.arange(1, error.shape[axis])
        border = at % mosaic.inner[axis] == 0
        if axis == 1:
            # Rows of different label blocks are no neighbours.
            step, border = step[:, at % mosaic.block_rows != 0], border[at % mosaic.block_rows != 0]
        parts = [step.compress(chosen, axis=axis) for chosen in (border, ~border)]
        across, inside = (
            float(np.nanmean(part)) if np.isfinite(part).any() else None for part in parts
        )
        if across is not None and inside:
            out[name] = {"border": across, "inside": inside, "ratio": across / inside}
    return out


def table_of(report: dict[str, Any]) -> str:
    """Markdown."""
    bytes_named = ", ".join(report["byte_features"]) or "none"
    lines = [
        f"# Rate and distortion on {report['blocks']} held-out blocks ({report['split']})",
        "",
        "PSNR: errors over each continuous feature's training range. PSNR 255: errors over 255, of features that are bytes",
        f"({bytes_named}). Rates: bits a valid value of the features held, and all bits over the valid values of continuous features;",
        "the bits of `valid` are counted with every codec.",
        "",
        "| codec | setting | bits a value | bits a continuous value | PSNR | PSNR 255 | RMSE | mIoU | canopy MAE | encode s | decode s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in sorted(
        report["points"],
        key=lambda point: (not point["all_features"], point["codec"], point["bits_per_continuous"]),
    ):
        rmse = ", ".join(f"{name} {value:.3g}" for name, value in point["rmse"].items())
        rates = [
            _number(point[key])
            for key in ("bits_per_value", "bits_per_continuous", "psnr", "psnr_255")
        ]
        rest = [
            _number(point.get(key))
            for key in ("miou", "canopy_mae", "encode_seconds", "decode_seconds")
        ]
        lines.append(
            "| " + " | ".join([point["codec"], point["setting"], *rates, rmse, *rest]) + " |"
        )
    lines += _equal_rate_table(
        report["at_equal_rate"], "others", "bits_per_continuous", "all bits over continuous values"
    )
    lines += _equal_rate_table(
        report["at_equal_rate"], "others_per_value", "bits_per_value", "bits a value held"
    )
    notes = [
        *(f"{name}: not measured, {why}" for name, why in report["absent"].items()),
        *(f"{name}: {why}" for name, why in report["few_rates"].items()),
    ]
    if notes:
        lines += [
            "",
            "Absent, or with fewer than five rates:",
            "",
            *(f"* {note}" for note in notes),
        ]
    lines += _category_table(report)
    seams = [
        f"{axis} {step['border']:.4f} / {step['inside']:.4f} = {step['ratio']:.2f}"
        for axis, step in report["seams"].items()
    ]
    lines += [
        "",
        "Seams, mean step of the error across borders / inside: " + (", ".join(seams) or "none"),
    ]
    apart = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in report["codec_bytes"].items())
    basis = max((point.get("bytes_apart", 0) for point in report["points"]), default=0)
    lines += [
        "",
        f"Apart, once for any number of cubes: {apart}, the largest PCA basis {basis / 1e6:.2f} MB.",
        f"Apart, once a version: which code has which number, {report['numbering_bytes'] / 1e6:.3f} MB of its manifest.",
        f"Seconds: the network on {report['threads']} threads.",
    ]
    return "\n".join([*lines, ""])


def _equal_rate_table(rows: list[dict[str, Any]], key: str, rate: str, text: str) -> list[str]:
    """PSNR of the codes and of the codecs that reach their rates."""
    names = [
        name
        for name in (rows[0][key] if rows else {})
        if any(row[key][name] is not None for row in rows)
    ]
    if not names:
        return []
    lines = [
        "",
        f"At the rates of the codes ({text}), PSNR in dB, interpolated along log(rate); empty: not reached.",
        "",
        "| " + " | ".join([text, "setting", OURS, *names]) + " |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in sorted(rows, key=lambda row: row[rate]):
        cells = [_number(row[rate]), row["setting"], f"{row['psnr']:.2f}"]
        lines.append("| " + " | ".join(cells + [_number(row[key][name]) for name in names]) + " |")
    return lines


def _category_table(report: dict[str, Any]) -> list[str]:
    """Lossless bits of every packing, and the mean IoU that the codes keep."""
    if not report["lossless_categories"]:
        return []
    lines = [
        "",
        "Categories without loss, bits a valid value, the bits of `valid` counted:",
        "",
        "| feature | packing | bits a value | encode s | decode s |",
        "|---|---|---|---|---|",
    ]
    for name, found in report["lossless_categories"].items():
        for packing, size in sorted(found["packings"].items(), key=lambda item: item[1]["bytes"]):
            text = f"**{packing}**" if packing == found["best"] else packing
            numbers = [
                _number(size.get(key))
                for key in ("bits_per_value", "encode_seconds", "decode_seconds")
            ]
            lines.append("| " + " | ".join([name, text, *numbers]) + " |")
    ours = [
        f"{_number(point['miou'])} at {_number(point['bits_per_value'])} bits a value of all features"
        for point in report["points"]
        if point["all_features"] and point.get("miou") is not None
    ]
    return [*lines, "", "Mean IoU of the codes: " + ", ".join(ours)] if ours else lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
