"""A cube's numbers as text: the lines of a log, the tables of a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from warehouse.format.manifest import Manifest
from warehouse.layouts.cube.geometry import CubeGeometry
from warehouse.layouts.features import Feature
from warehouse.layouts.tables import TextTable

__all__ = ["cube_lines", "cube_tables"]


def cube_lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary as the few lines that a log shows of what is to be built."""
    shape = " x ".join(f"{count} {axis}" for axis, count in summary["shape"].items())
    methods = ", ".join(f"{name}: {method}" for name, method in summary["resampling"].items())
    lines = [
        f"cube of {shape}, {summary['first']} to {summary['last']}, "
        f"from {summary['sources']} rasters",
        f"warped by {methods}",
    ]
    if summary["static"]:
        lines.append(f"repeated along time: {', '.join(summary['static'])}")

    return lines


def cube_tables(cube: CubeGeometry, manifest: Manifest) -> list[TextTable]:
    """The cube, its features and its splits, for a terminal."""
    layout = cube.layout
    crs = cube.crs_wkt.split('"')[1] if '"' in cube.crs_wkt else cube.crs_wkt
    rows, columns = cube.extent
    values = (
        ("digest", manifest.digest),
        ("shape", " x ".join(map(str, cube.shape)) + " (time, y, x, feature)"),
        ("declared grid", f"{rows} rows, {columns} columns of {cube.transform[0]:g}"),
        ("bounds", manifest.summary["bounds"]),
        ("CRS", crs),
        ("dates", f"{len(cube.times)}, {cube.times[0]} to {cube.times[-1]}"),
        ("sample / stored chunk / block", f"{layout.inner} / {layout.shard} / {layout.block}"),
        ("inner chunk", f"{(*layout.inner, layout.group)}"),
        ("code", manifest.recipe.get("code_version")),
    )
    head = tuple((key, str(value)) for key, value in values)

    numbers = ("feature", "kind", "valid", "mean", "std", "min", "max", "codes (training voxels)")
    features = tuple(_feature_row(feature) for feature in cube.features)

    splits = [(name, str(info.samples), str(info.chunks)) for name, info in manifest.splits.items()]
    splits.append(("left out", str(manifest.summary["samples"]["left_out"]), "-"))

    return [
        TextTable(f"version {manifest.version}", (), head),
        TextTable("features, over training voxels", numbers, features),
        TextTable(
            "splits by blocks", ("split", "samples", "stored chunks it lies in"), tuple(splits)
        ),
    ]


def _feature_row(feature: Feature) -> tuple[str, ...]:
    statistics = (feature.mean, feature.std, feature.minimum, feature.maximum)
    counted = zip(feature.codes, feature.class_counts, strict=False)

    return (
        feature.name,
        feature.kind + (", static" if feature.static else ""),
        f"{feature.valid_share:.1%}",
        *(f"{value:.4g}" if value is not None else "-" for value in statistics),
        ", ".join(f"{code} ({count})" for code, count in counted),
    )
