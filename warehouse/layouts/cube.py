"""A baked cube's metadata: the `cube` group with coordinates, georeference and feature table, its
small arrays, samples.parquet.

The group reads with xarray as it is (CF time, named coordinates, `spatial_ref`), and carries
`proj:` and `spatial:` attributes: https://github.com/zarr-conventions/proj,
https://github.com/zarr-conventions/spatial, v0.1 of both, registered in `zarr_conventions` as
https://github.com/zarr-conventions/zarr-conventions-spec asks. Given up: a content digest that
knows of missing stored chunks alone; it is over every inner chunk in C order of the cube, so that
no stored chunk size changes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from warehouse.errors import SourceError
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.inner_chunks import chunk_key, encode
from warehouse.format.schema import ArraySpec
from warehouse.layouts.cube_geometry import (
    LABELS,
    LEFT_OUT,
    VALID_SHARE,
    Cube,
    CubeLayout,
    CubePlaces,
)
from warehouse.layouts.cube_stats import merge_features, valid_by_date
from warehouse.layouts.metadata import consolidated, create_array
from warehouse.layouts.pictures import Contents, array_info
from warehouse.settings import SPLIT_NAMES
from warehouse.write.bake import BuildPlan, ChunkResult

__all__ = ["CUBE_SAMPLES_SCHEMA", "cube_contents"]

CUBE_SAMPLES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("chunk", pa.int64()),
        ("slot", pa.int32()),
        ("t", pa.int64()),
        ("y", pa.int64()),
        ("x", pa.int64()),
        ("valid_share", pa.float32()),
        ("sha256", pa.string()),
    ]
)
"""chunk: number of the stored chunk in the cube; slot: inner chunk in it; t, y, x: first voxel.

sha256: of data and valid, decoded.
"""


def _convention(name: str, uuid: str, text: str) -> dict[str, str]:
    return {
        "schema_url": f"https://raw.githubusercontent.com/zarr-conventions/{name}/refs/tags/v0.1/schema.json",
        "spec_url": f"https://github.com/zarr-conventions/{name}/blob/v0.1/README.md",
        "uuid": uuid,
        "name": name,
        "description": text,
    }


CONVENTIONS = [
    _convention(
        "proj",
        "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "Coordinate reference system information for geospatial data",
    ),
    _convention(
        "spatial", "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4", "Spatial coordinate information"
    ),
]


def cube_contents(plan: BuildPlan, results: Sequence[ChunkResult], store: Path) -> Contents:
    """Writes the group, its coordinates and small arrays.

    Raises SourceError for a date without any valid value.
    """
    assert plan.cube is not None
    layout, facts = plan.cube.cube.layout, [result.facts for result in results]
    _check_dates(plan, facts)
    source = plan.cube.cube
    cube = replace(source, features=merge_features(source.features, facts))
    digests = np.zeros((layout.stored_chunks, layout.slots), "S64")
    shares = np.zeros((layout.stored_chunks, layout.slots), np.float32)
    for chunk, result in enumerate(results):
        slots = layout.present(chunk)
        digests[chunk, slots] = result.samples
        shares[chunk, slots] = result.facts["valid_share"]
    inner_shares = _by_inner(layout, shares)
    counts = {"left_out": int(np.count_nonzero(layout.inner_labels(plan.cube.labels) == LEFT_OUT))}
    columns, splits = _samples(layout, plan.cube.labels, digests, shares)
    summary = plan.summary | {
        "samples": {name: info["samples"] for name, info in splits.items()} | counts
    }
    files = _write_group(plan, cube, inner_shares, summary, store)
    specs = plan.splits[0].specs
    digested = [
        [
            list(layout.shape),
            list(layout.inner),
            [[each.name, each.kind, list(each.codes)] for each in cube.features],
            list(cube.times),
        ],
        layout.inner_labels(plan.cube.labels).tobytes().hex(),
        _by_inner(layout, digests).tobytes().decode(),
    ]
    return Contents(
        columns,
        CUBE_SAMPLES_SCHEMA,
        digested,
        splits,
        array_info(specs),
        summary,
        files,
        cube.to_json(),
    )


def _check_dates(plan: BuildPlan, facts: list[dict[str, Any]]) -> None:
    assert plan.cube is not None
    cube = plan.cube
    if cube.keep_empty_dates or all(feature.static for feature in cube.cube.features):
        return
    empty = np.flatnonzero(valid_by_date(cube.cube.layout, facts) == 0)
    if empty.size:
        at = int(empty[0])
        raise SourceError(
            f"{empty.size} dates hold no valid value, the first is {cube.cube.times[at]}",
            where=cube.date_sources[at],
            remedy="move these files away, or keep such dates with --raster.empty_dates keep",
        )


def _by_inner(layout: CubeLayout, values: NDArray[Any]) -> NDArray[Any]:
    """[stored chunks, slots] -> [inner grid]: the inverse of CubeLayout.by_chunk."""
    grid, per, inner = layout.shard_grid, layout.per_shard, layout.inner_grid
    room = (
        values.reshape(*grid, *per)
        .transpose(0, 3, 1, 4, 2, 5)
        .reshape([g * p for g, p in zip(grid, per, strict=True)])
    )
    return np.ascontiguousarray(room[: inner[0], : inner[1], : inner[2]])


def _samples(
    layout: CubeLayout,
    labels: NDArray[np.uint8],
    digests: NDArray[Any],
    shares: NDArray[np.float32],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(columns of samples.parquet, the manifest's splits). A split without samples is left out."""
    parts: list[dict[str, Any]] = []
    splits = {}
    for label, name in enumerate(SPLIT_NAMES):
        places = CubePlaces(layout, labels, label)
        if not len(places):
            continue
        index = np.arange(len(places))
        chunks, origins = places.numbers[places.chunks], places.origins(index)
        parts.append(
            {
                "split": np.full(len(places), name),
                "index": index,
                "chunk": chunks,
                "slot": places.slots.astype(np.int32),
                "t": origins[:, 0],
                "y": origins[:, 1],
                "x": origins[:, 2],
                "valid_share": shares[chunks, places.slots],
                "sha256": digests[chunks, places.slots].astype(str),
            }
        )
        splits[name] = {
            "samples": len(places),
            "shard_samples": layout.slots,
            "chunks": len(places.chunk_sizes),
        }
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, splits


def _write_group(
    plan: BuildPlan, cube: Cube, shares: NDArray[np.float32], summary: dict[str, Any], store: Path
) -> list[dict[str, Any]]:
    """Metadata, coordinates, labels and shares; rows of files.parquet for what is not zarr.json."""
    assert plan.cube is not None
    layout = cube.layout
    shared = {"class_names": [], "layout": "cube", "version": plan.version, "summary": summary}
    rows = []
    with consolidated(store, ["cube"], shared) as groups:
        group = groups["cube"]
        group.attrs.update(
            shared
            | georeference(cube)
            | {"features": [feature.to_json() for feature in cube.features]}
        )
        for spec in plan.splits[0].specs:
            create_array(group, on_disk(spec, layout, cube))
        for small, values in ((LABELS, plan.cube.labels), (VALID_SHARE, shares)):
            spec = small.spec(layout)
            create_array(group, spec)
            data = encode(values, spec.codec)
            path = store / "cube" / spec.name / chunk_key(spec, 0)
            durable.write_bytes(path, data)
            rows.append(
                _row(store, path)
                | {
                    "array": f"cube/{spec.name}",
                    "chunk": 0,
                    "seal": int.from_bytes(data[-4:], "little"),
                }
            )
        for name in _write_coordinates(group, cube):
            for path in sorted((store / "cube" / name).rglob("*")):
                if path.is_file() and path.name != "zarr.json":
                    durable.write_bytes(path, path.read_bytes())  # zarr does not fsync
                    rows.append(_row(store, path))
    return rows


def _row(store: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(store.parent).as_posix()
    return {
        "path": name,
        "size": path.stat().st_size,
        "sha256": tables.sha256_file(path),
        "array": None,
        "chunk": None,
        "seal": None,
    }


def on_disk(spec: ArraySpec, layout: CubeLayout, cube: Cube) -> ArraySpec:
    """The Zarr array behind a by-sample spec."""
    assert spec.inner is not None
    group = layout.group
    # Properties of a group hold for the arrays in it, but a reader that opens an array alone does
    # not look up.
    attrs: dict[str, Any] = {"grid_mapping": "spatial_ref"} | georeference(cube)
    if spec.name == "data":
        attrs |= {"long_name": "values, NaN where missing; categories as their codes"}
    else:
        attrs |= {"long_name": "true where data holds a value"}
    dims = ("time", "y", "x", "feature")
    stored, inner = (*layout.shard, spec.parts * group), (*layout.inner, group)
    return ArraySpec(spec.name, layout.shape, spec.dtype, dims, stored, inner, spec.codec, attrs)


def _write_coordinates(group: Any, cube: Cube) -> list[str]:
    a, _, c, _, e, f = cube.transform
    _, height, width, _ = cube.shape
    projected = cube.crs_wkt.startswith("PROJ")  # PROJCS in WKT1, PROJCRS in WKT2
    place = (
        ("projection_x_coordinate", "projection_y_coordinate")
        if projected
        else ("longitude", "latitude")
    )
    epoch = {
        "standard_name": "time",
        "units": "seconds since 1970-01-01",
        "calendar": "proleptic_gregorian",
    }
    columns: dict[str, tuple[Any, dict[str, Any]]] = {
        "time": (cube.dates.astype(np.int64), epoch),
        "y": (f + e * (np.arange(height) + 0.5), {"standard_name": place[1], "axis": "Y"}),
        "x": (c + a * (np.arange(width) + 0.5), {"standard_name": place[0], "axis": "X"}),
        "feature": (np.array([feature.name for feature in cube.features], dtype=object), {}),
    }
    for name, (values, attrs) in columns.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=str if values.dtype == object else values.dtype,
            dimension_names=(name,),
            attributes=attrs,
            compressors=None,
            chunks=values.shape,
        )
        array[:] = values
    transform = f"{c} {a} 0.0 {f} 0.0 {e}"
    place_attrs = {"crs_wkt": cube.crs_wkt, "spatial_ref": cube.crs_wkt, "GeoTransform": transform}
    group.create_array(
        "spatial_ref", shape=(), dtype="int64", attributes=place_attrs, compressors=None
    )[...] = 0
    return [*columns, "spatial_ref"]


def georeference(cube: Cube) -> dict[str, Any]:
    """`proj:` and `spatial:` attributes of the group and of `data` and `valid`. proj:code is left
    out where the CRS has none.
    """
    a, b, c, d, e, f = cube.transform
    _, height, width, _ = cube.shape
    code = (
        {"proj:code": cube.crs_code} if re.fullmatch("[A-Z]+:[0-9]+", cube.crs_code or "") else {}
    )
    return code | {
        "zarr_conventions": CONVENTIONS,
        "proj:wkt2": cube.crs_wkt,
        "spatial:dimensions": ["y", "x"],
        "spatial:transform_type": "affine",
        "spatial:transform": [a, b, c, d, e, f],
        "spatial:shape": [height, width],
        "spatial:bbox": [c, f + e * height, c + a * width, f],
        "spatial:registration": "pixel",
    }
