"""The rate-distortion report: the codes of a cube's held-out blocks at every number of levels, beside other codecs on the same values.

report.json has every point, report.md the table, report.png the curves. Two abscissas, so that nothing is hidden: `bits_per_value` is
over the valid values of the features a codec holds (the codes hold all, other codecs the continuous ones), `bits_per_continuous` charges
the codes of all features to the continuous values alone. Curves are drawn over the second, which is the harder one for the codes.
Memory: the held-out blocks, at most `report_samples`, four times over.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqvae.baselines import Mosaic, baseline_points
from vqvae.compress import BATCH, CompressSettings, CubePart, code_arrays, encode_blocks
from vqvae.rate import Distortion, entropy_bits, feature_ranges, packed_bytes
from vqvae.reconstruct import CodesOfCube, decode_blocks
from warehouse import durable
from warehouse.errors import BuildError
from warehouse.schema import SPLIT_NAMES, ArraySpec, Codec
from warehouse.store import Warehouse

__all__ = ["EARLIER", "seam_steps", "write_report"]

EARLIER = {
    "prototype VQ-VAE (its own PSNR scale)": ((0.006, 24.8), (0.013, 26.1), (0.028, 27.4), (0.057, 28.3)),
    "prototype PCA + JPEG 2000 (its own PSNR scale)": ((0.012, 26.1), (0.042, 28.8), (0.124, 32.6), (0.28, 35.5)),
}
"""Measured before on NAIP (bits a value, PSNR in dB); over which range was not noted: shapes of curves to compare, not heights."""
Draw = tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]]


def write_report(cube: Warehouse, codes: Path, settings: CompressSettings, folder: Path) -> dict[str, Any]:
    """Write the report; {points, psnr, seams, report}. Raises BuildError when the folder cannot be written."""
    version = CodesOfCube(codes, settings.checkpoint, device=settings.device)
    layout, features = version.cube.layout, version.cube.features
    split = next(name for name in ("val", "test", "train") if name in cube.splits)
    data, valid, origins = drawn(cube, split, settings.report_samples, by_block=True)
    truth = np.where(valid, data, 0)
    facts = Distortion(features)
    facts.add(truth, truth, valid)
    held, every = facts.values, int(facts.count.sum())
    mosaic = Mosaic(origins, layout.inner, layout.block)
    points, guess = code_points(version, data, valid, origins, settings.shard_samples)
    seams = seam_steps(mosaic, data, guess, valid, features) if guess is not None else {}
    points += other_points(cube, data, valid, features, mosaic, facts.continuous, min(settings.report_samples, 512))
    for point in points:
        point["bits_per_value"] = 8 * point["bytes"] / max(1, every if point["all_features"] else held)
        point["bits_per_continuous"] = 8 * point["bytes"] / max(1, held)
    lossless = lossless_categories(data, valid, features)
    best = max((point for point in points if point["all_features"]), key=lambda point: point["levels"])
    report = {"split": split, "blocks": len(data), "continuous_values": held, "values": every, "ranges": ranges_of(features),
              "points": points,
              "seams": seams, "lossless_categories": lossless,
              "checkpoint": version.warehouse.manifest.recipe["checkpoint"],
              "codec_bytes": {"decoder": version.codec.decoder_bytes, "codebook": version.codec.codebook_bytes}}  # fmt: skip
    try:
        durable.write_bytes(folder / "report.json", json.dumps(report, indent=1).encode())
        durable.write_bytes(folder / "report.md", table_of(report).encode())
        draw(points, folder / "report.png")
    except OSError as error:
        raise BuildError(
            "the report cannot be written", where=folder, found=error.strerror, remedy="choose another --compress.report"
        ) from None
    return {"points": points, "psnr": best["psnr"], "seams": seams, "report": str(folder / "report.md")}


def ranges_of(features: Any) -> dict[str, float]:
    return {
        feature.name: float(size) for feature, size in zip(features, feature_ranges(features), strict=True) if feature.kind == "continuous"
    }


def drawn(cube: Warehouse, split: str, most: int, *, by_block: bool) -> Draw:
    """(data, valid, origins) of up to `most` samples of a split: of whole label blocks in a fixed random order, or spread evenly."""
    assert cube.cube is not None
    part = CubePart(cube, SPLIT_NAMES.index(split))
    origins = part.places.origins(np.arange(len(part)))
    if by_block:
        _, number = np.unique(origins[:, 1:] // np.array(cube.cube.layout.block[1:]), axis=0, return_inverse=True)
        order = np.random.default_rng(0).permutation(int(number.max()) + 1)
        chosen = np.sort(np.argsort(order[number.reshape(-1)], kind="stable")[:most])
    else:
        chosen = np.unique(np.linspace(0, len(part) - 1, min(most, len(part))).astype(np.int64))
    out: dict[str, NDArray[Any]] = {name: np.empty((len(chosen), *spec.shape[1:]), spec.dtype) for name, spec in part.specs.items()}
    part.reader().fill(list(out), chosen, out)
    return out["data"], out["valid"], origins[chosen]


def code_points(
    version: CodesOfCube, data: NDArray[np.float32], valid: NDArray[np.bool_], origins: NDArray[np.int64], size: int
) -> tuple[list[dict[str, Any]], NDArray[np.float32] | None]:
    """A point for each number of levels, and what all of them decode to."""
    codec, inner = version.codec, version.cube.layout.inner
    start = time.perf_counter()
    codes = np.concatenate([encode_blocks(codec, data[at : at + BATCH], valid[at : at + BATCH]) for at in range(0, len(data), BATCH)])
    encode_seconds = time.perf_counter() - start
    bits = np.packbits(valid.reshape(len(valid), -1), axis=1)
    points, guess = [], None
    for levels in range(1, version.levels + 1):
        specs = {spec.name: spec for spec in code_arrays(len(data), size, levels, codes.shape[2:], codec.codebook_size, valid[0].size)}
        kept = codes[:, :levels]
        rows = {"codes": kept.astype(specs["codes"].dtype), "valid": bits, "origin": origins.astype(np.int32)}
        sizes = {name: packed_bytes(rows[name], spec) for name, spec in specs.items()}
        ideal = sum(entropy_bits(kept[:, level], codec.codebook_size) for level in range(levels)) / 8
        start = time.perf_counter()
        guess = np.concatenate([decode_blocks(codec, kept[at : at + BATCH], inner) for at in range(0, len(kept), BATCH)])
        decode_seconds = time.perf_counter() - start
        errors = Distortion(version.cube.features)
        errors.add(data, guess, valid)
        points.append({
            "codec": "VQ-VAE", "setting": f"{levels} levels", "levels": levels, "all_features": True, "bytes": sum(sizes.values()),
            "bytes_by_array": sizes, "ideal_codes_bytes": ideal, "fixed_codes_bytes": kept.size * np.log2(codec.codebook_size) / 8,
            **errors.figures(), "encode_seconds": encode_seconds, "decode_seconds": decode_seconds,
        })  # fmt: skip
    return points, guess


def other_points(cube: Warehouse, data: NDArray[np.float32], valid: NDArray[np.bool_], features: Any, mosaic: Mosaic, some: list[int],
                 most: int) -> list[dict[str, Any]]:  # fmt: skip
    """The baselines, on continuous features."""
    if not some:
        return []
    ranges = feature_ranges(features)[some].astype(np.float32)
    means = np.array([features[at].mean or 0.0 for at in some], np.float32)

    def scaled(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float32]:
        out: NDArray[np.float32] = np.where(mask[..., some], (values[..., some] - means) / ranges, 0).astype(np.float32)
        return out

    train, train_valid, _ = drawn(cube, "train", most, by_block=False)
    points = []
    for coded in baseline_points(scaled(train, train_valid), scaled(data, valid), mosaic):
        errors = Distortion([features[at] for at in some])
        errors.add(data[..., some], coded.guess * ranges + means, valid[..., some])
        points.append({"codec": coded.codec, "setting": coded.setting, "levels": 0, "all_features": False, "bytes": coded.bytes,
                       **errors.figures(), "encode_seconds": coded.encode_seconds, "decode_seconds": coded.decode_seconds})  # fmt: skip
    return points


def lossless_categories(data: NDArray[np.float32], valid: NDArray[np.bool_], features: Any) -> dict[str, float]:
    """Bits a valid value of each categorical feature, its classes as bytes through Blosc-zstd in chunks of 256 blocks."""
    out = {}
    for at, feature in enumerate(features):
        if feature.kind == "categorical":
            codes = np.sort(np.array(feature.codes, np.float32))
            place = np.searchsorted(codes, np.where(valid[..., at], data[..., at], codes[0])).astype(np.uint8).reshape(len(data), -1)
            spec = ArraySpec("class", place.shape, "uint8", ("sample", "voxel"), (256, place.shape[1]), None, Codec("zstd", 9))
            out[feature.name] = 8 * packed_bytes(place, spec) / max(1, int(valid[..., at].sum()))
    return out


def seam_steps(
    mosaic: Mosaic, data: NDArray[np.float32], guess: NDArray[np.float32], valid: NDArray[np.bool_], features: Any
) -> dict[str, dict[str, float]]:
    """Mean absolute step of the reconstruction error between neighbouring voxels, {axis: {border, inside, ratio}}.

    border: across inner chunks, which decode without knowing each other; inside: within one. Errors over the features' ranges,
    continuous ones only. A ratio of 1 is no seam.
    """
    some = [at for at, feature in enumerate(features) if feature.kind == "continuous"]
    ranges = feature_ranges(features)[some].astype(np.float32)
    known = valid[..., some]
    error = mosaic.lay(np.where(known, (guess[..., some] - data[..., some]) / ranges, np.nan).astype(np.float32), np.nan)
    out = {}
    for axis, name in enumerate(("time", "y", "x")):
        step = np.abs(np.diff(error, axis=axis))
        at = np.arange(1, error.shape[axis])
        border = at % mosaic.inner[axis] == 0
        if axis == 1:
            # Rows of different label blocks are no neighbours.
            step, border = step[:, at % mosaic.block_rows != 0], border[at % mosaic.block_rows != 0]
        parts = [step.compress(chosen, axis=axis) for chosen in (border, ~border)]
        across, inside = (float(np.nanmean(part)) if np.isfinite(part).any() else None for part in parts)
        if across is not None and inside:
            out[name] = {"border": across, "inside": inside, "ratio": across / inside}
    return out


def table_of(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"# Rate and distortion on {report['blocks']} held-out blocks ({report['split']})", "",
        "PSNR: errors over each continuous feature's training range. Rates: bits a valid value of the features held, and all bits over the",
        "valid values of continuous features.", "",
        "| codec | setting | bits a value | bits a continuous value | PSNR dB | RMSE | mIoU | canopy MAE | encode s | decode s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for point in sorted(report["points"], key=lambda point: (not point["all_features"], point["codec"], point["bits_per_continuous"])):
        rmse = ", ".join(f"{name} {value:.3g}" for name, value in point["rmse"].items())
        rates = [_number(point[key]) for key in ("bits_per_value", "bits_per_continuous", "psnr")]
        rest = [_number(point.get(key)) for key in ("miou", "canopy_mae", "encode_seconds", "decode_seconds")]
        lines.append("| " + " | ".join([point["codec"], point["setting"], *rates, rmse, *rest]) + " |")
    lossless = [f"{name} {bits:.3f} bits a value" for name, bits in report["lossless_categories"].items()]
    seams = [f"{axis} {step['border']:.4f} / {step['inside']:.4f} = {step['ratio']:.2f}" for axis, step in report["seams"].items()]
    lines += ["", "Categories without loss: " + (", ".join(lossless) or "none")]
    lines += ["", "Seams, mean step of the error across borders / inside: " + (", ".join(seams) or "none")]
    apart = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in report["codec_bytes"].items())
    return "\n".join([*lines, "", f"Apart, once for any number of cubes: {apart}.", ""])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """PSNR over bits a continuous value, logarithmic."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(point["codec"] for point in points):
        mine = (point for point in points if point["codec"] == name and point["bytes"] and point["psnr"] is not None)
        curve = sorted((point["bits_per_continuous"], point["psnr"]) for point in mine)
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", linewidth=3 if name == "VQ-VAE" else 1.2, label=name)
    for name, earlier in EARLIER.items():
        axes.plot(*zip(*earlier, strict=True), linestyle=":", marker=".", color="0.55" if "VQ" in name else "0.75", label=name)
    axes.set_xscale("log")
    axes.set_xlabel("bits a valid continuous value")
    axes.set_ylabel("PSNR over the features' ranges, dB")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    durable.write_bytes(path, buffer.getvalue())
