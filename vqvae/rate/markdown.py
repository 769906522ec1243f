"""report.md: the tables of a rate-distortion report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from vqvae.rate.points import OURS, EqualRate, RatePoint, RateReport

__all__ = ["table_of"]


def table_of(report: RateReport) -> str:
    """Return the report as Markdown."""
    lines = [
        *_introduction(report),
        *_point_table(report["points"]),
        *_equal_rate_table(
            report["at_equal_rate"],
            "others",
            "bits_per_continuous",
            "all bits over continuous values",
        ),
        *_equal_rate_table(
            report["at_equal_rate"],
            "others_per_value",
            "bits_per_value",
            "bits a value held",
        ),
        *_notes(report),
        *_category_table(report),
        *_seams(report["seams"]),
        *_apart(report),
    ]
    return "\n".join([*lines, ""])


def _introduction(report: RateReport) -> list[str]:
    bytes_named = ", ".join(report["byte_features"]) or "none"
    return [
        f"# Rate and distortion on {report['blocks']} held-out blocks ({report['split']})",
        "",
        "PSNR: errors over each continuous feature's training range."
        " PSNR 255: errors over 255, of features that are bytes",
        f"({bytes_named}). Rates: bits a valid value of the features held,"
        " and all bits over the valid values of continuous features;",
        "the bits of `valid` are counted with every codec.",
    ]


def _point_table(points: Sequence[RatePoint]) -> list[str]:
    names = (
        "codec",
        "setting",
        "bits a value",
        "bits a continuous value",
        "PSNR",
        "PSNR 255",
        "RMSE",
        "mIoU",
        "canopy MAE",
        "encode s",
        "decode s",
    )
    lines = ["", *_header(names)]

    for point in sorted(points, key=_order):
        rmse = ", ".join(f"{name} {value:.3g}" for name, value in point["rmse"].items())
        cells = [
            point["codec"],
            point["setting"],
            _number(point["bits_per_value"]),
            _number(point["bits_per_continuous"]),
            _number(point["psnr"]),
            _number(point["psnr_255"]),
            rmse,
            _number(point.get("miou")),
            _number(point.get("canopy_mae")),
            _number(point.get("encode_seconds")),
            _number(point.get("decode_seconds")),
        ]
        lines.append(_row(cells))
    return lines


def _order(point: RatePoint) -> tuple[bool, str, float]:
    """The codes first, then codec by codec along the rate."""
    # Codes hold all features and other codecs do not, so this puts the codes first.
    return not point["all_features"], point["codec"], point["bits_per_continuous"]


def _equal_rate_table(
    rows: Sequence[EqualRate],
    key: Literal["others", "others_per_value"],
    rate: Literal["bits_per_continuous", "bits_per_value"],
    text: str,
) -> list[str]:
    """PSNR of the codes and of the codecs that reach their rates."""
    every = rows[0][key] if rows else {}
    # A column of a codec that reaches no rate of the codes would be empty.
    names = [name for name in every if any(row[key][name] is not None for row in rows)]
    if not names:
        return []

    lines = [
        "",
        f"At the rates of the codes ({text}), PSNR in dB, interpolated along log(rate);"
        " empty: not reached.",
        "",
        *_header([text, "setting", OURS, *names]),
    ]
    for row in sorted(rows, key=lambda row: row[rate]):
        others = [_number(row[key][name]) for name in names]
        lines.append(_row([_number(row[rate]), row["setting"], f"{row['psnr']:.2f}", *others]))
    return lines


def _notes(report: RateReport) -> list[str]:
    notes = [
        *(f"{name}: not measured, {why}" for name, why in report["absent"].items()),
        *(f"{name}: {why}" for name, why in report["few_rates"].items()),
    ]
    if not notes:
        return []
    return [
        "",
        "Absent, or with fewer than five rates:",
        "",
        *(f"* {note}" for note in notes),
    ]


def _category_table(report: RateReport) -> list[str]:
    """Lossless bits of every packing, and the mean IoU that the codes keep."""
    if not report["lossless_categories"]:
        return []

    lines = [
        "",
        "Categories without loss, bits a valid value, the bits of `valid` counted:",
        "",
        *_header(["feature", "packing", "bits a value", "encode s", "decode s"]),
    ]
    for name, found in report["lossless_categories"].items():
        by_size = sorted(found["packings"].items(), key=lambda item: item[1]["bytes"])
        for packing, size in by_size:
            cells = [
                name,
                f"**{packing}**" if packing == found["best"] else packing,
                _number(size.get("bits_per_value")),
                _number(size.get("encode_seconds")),
                _number(size.get("decode_seconds")),
            ]
            lines.append(_row(cells))

    # Beside the lossless bits, since the codes keep categories with errors.
    ours = []
    for point in report["points"]:
        miou = point.get("miou")
        if point["all_features"] and miou is not None:
            rate = _number(point["bits_per_value"])
            ours.append(f"{_number(miou)} at {rate} bits a value of all features")
    if ours:
        lines += ["", "Mean IoU of the codes: " + ", ".join(ours)]
    return lines


def _seams(seams: Mapping[str, Mapping[str, float]]) -> list[str]:
    found = [
        f"{axis} {step['border']:.4f} / {step['inside']:.4f} = {step['ratio']:.2f}"
        for axis, step in seams.items()
    ]
    return [
        "",
        "Seams, mean step of the error across borders / inside: " + (", ".join(found) or "none"),
    ]


def _apart(report: RateReport) -> list[str]:
    sizes = report["codec_bytes"].items()
    apart = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes)
    # The largest alone: bases of several codecs are not needed together.
    basis = max((point.get("bytes_apart", 0) for point in report["points"]), default=0)
    return [
        "",
        f"Apart, once for any number of cubes: {apart},"
        f" the largest PCA basis {basis / 1e6:.2f} MB.",
        "Apart, once a version: which code has which number,"
        f" {report['numbering_bytes'] / 1e6:.3f} MB of its manifest.",
        f"Seconds: the network on {report['threads']} threads.",
    ]


def _header(names: Sequence[str]) -> list[str]:
    return [_row(names), "|---" * len(names) + "|"]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    # Empty and not 0 or NaN: the codec was not measured on it.
    return "" if value is None else f"{value:.4g}"
