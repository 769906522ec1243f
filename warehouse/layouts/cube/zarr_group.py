"""The Zarr group of a baked cube: coordinates, georeference, feature table and small arrays.

xarray reads the group as it is (CF time, named coordinates, `spatial_ref`). The group also carries
the attributes of the conventions https://github.com/zarr-conventions/proj and
https://github.com/zarr-conventions/spatial, version 0.1 of both, and registers them in
`zarr_conventions` as https://github.com/zarr-conventions/zarr-conventions-spec requires. The place
is therefore stored twice: readers of rasters know the older form, which no Zarr convention has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.inner_chunks import chunk_key, encode
from warehouse.format.schema import ArraySpec
from warehouse.layouts.cube.arrays import LABELS, VALID_SHARE
from warehouse.layouts.cube.geometry import CubeGeometry
from warehouse.layouts.metadata import consolidated, create_array

if TYPE_CHECKING:
    import zarr
    from zarr.core.common import JSON

__all__ = ["georeference", "on_disk", "write_cube_group"]


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


def write_cube_group(
    store: Path,
    geometry: CubeGeometry,
    specs: Sequence[ArraySpec],
    labels: NDArray[np.uint8],
    shares: NDArray[np.float32],
    *,
    version: str,
    summary: dict[str, Any],
) -> list[dict[str, Any]]:
    """Write metadata, coordinates, labels and shares of valid values.

    Parameters
    ----------
    store
        The Zarr store in the staging folder.
    specs
        `data` and `valid` as readers see them, by sample.
    labels
        Split of each label block, uint8 [block grid].
    shares
        Share of valid values of each inner chunk, float32 [inner grid].

    Returns
    -------
    list
        Rows of files.parquet for all files written here but zarr.json.
    """
    shared = {"class_names": [], "layout": "cube", "version": version, "summary": summary}
    rows = []

    with consolidated(store, ["cube"], shared) as groups:
        group = groups["cube"]
        group.attrs.update(
            shared
            | georeference(geometry)
            | {"features": [feature.to_json() for feature in geometry.features]}
        )

        for spec in specs:
            create_array(group, on_disk(spec, geometry))

        for small, values in ((LABELS, labels), (VALID_SHARE, shares)):
            rows.append(_write_small_array(store, group, small.spec(geometry.layout), values))

        for name in _write_coordinates(group, geometry):
            for path in sorted((store / "cube" / name).rglob("*")):
                if path.is_file() and path.name != "zarr.json":
                    # Written once more, because zarr-python does not fsync.
                    durable.write_bytes(path, path.read_bytes())
                    rows.append(_row(store, path))

    return rows


def _write_small_array(
    store: Path, group: zarr.Group, spec: ArraySpec, values: NDArray[Any]
) -> dict[str, Any]:
    """Write an array of one chunk; return its row of files.parquet."""
    create_array(group, spec)

    # The chunk is written by our own code and not by zarr-python, so that it has a seal, and is
    # checked when it is read, as the data are.
    data = encode(values, spec.codec)
    path = store / "cube" / spec.name / chunk_key(spec, 0)
    durable.write_bytes(path, data)
    sealed = {
        "array": f"cube/{spec.name}",
        "chunk": 0,
        "seal": int.from_bytes(data[-4:], "little"),
    }
    return _row(store, path) | sealed


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


def on_disk(spec: ArraySpec, cube: CubeGeometry) -> ArraySpec:
    """Return the Zarr array [time, y, x, feature] that holds what readers see as `spec`."""
    assert spec.inner is not None
    layout = cube.layout
    group = layout.group
    # Properties of a group hold for the arrays in it, but a reader that opens an array alone does
    # not look up.
    attrs: dict[str, Any] = {"grid_mapping": "spatial_ref"} | georeference(cube)
    if spec.name == "data":
        attrs |= {"long_name": "values, NaN where missing; categories as their codes"}
    else:
        attrs |= {"long_name": "true where data holds a value"}

    return ArraySpec(
        spec.name,
        layout.shape,
        spec.dtype,
        dims=("time", "y", "x", "feature"),
        # Zarr requires that a shard is a multiple of its inner chunks, so that the last feature
        # group may reach beyond the array.
        chunk=(*layout.shard, spec.parts * group),
        inner=(*layout.inner, group),
        codec=spec.codec,
        attrs=attrs,
    )


def _write_coordinates(group: zarr.Group, cube: CubeGeometry) -> list[str]:
    """Write the coordinate arrays and return their names."""
    a, _, c, _, e, f = cube.transform
    _, height, width, _ = cube.shape
    # PROJCS in WKT1, PROJCRS in WKT2.
    projected = cube.crs_wkt.startswith("PROJ")
    standard_names = (
        ("projection_x_coordinate", "projection_y_coordinate")
        if projected
        else ("longitude", "latitude")
    )
    epoch: dict[str, JSON] = {
        "standard_name": "time",
        "units": "seconds since 1970-01-01",
        "calendar": "proleptic_gregorian",
    }
    # CF has coordinates of the centres of pixels; the transform is that of their corners.
    columns: dict[str, tuple[NDArray[Any], dict[str, JSON]]] = {
        "time": (cube.dates.astype(np.int64), epoch),
        "y": (f + e * (np.arange(height) + 0.5), {"standard_name": standard_names[1], "axis": "Y"}),
        "x": (c + a * (np.arange(width) + 0.5), {"standard_name": standard_names[0], "axis": "X"}),
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

    # The order of GDAL's GeoTransform, which rioxarray reads; affine has it as a, b, c, d, e, f.
    transform = f"{c} {a} 0.0 {f} 0.0 {e}"
    georeference_attrs: dict[str, JSON] = {
        "crs_wkt": cube.crs_wkt,
        "spatial_ref": cube.crs_wkt,
        "GeoTransform": transform,
    }
    group.create_array(
        "spatial_ref", shape=(), dtype="int64", attributes=georeference_attrs, compressors=None
    )[...] = 0
    return [*columns, "spatial_ref"]


def georeference(cube: CubeGeometry) -> dict[str, Any]:
    """Return the `proj:` and `spatial:` attributes of the group and of `data` and `valid`."""
    a, b, c, d, e, f = cube.transform
    _, height, width, _ = cube.shape
    # The convention's schema has this pattern; a CRS without a code is told by its WKT2 alone.
    has_code = re.fullmatch("[A-Z]+:[0-9]+", cube.crs_code or "")
    code = {"proj:code": cube.crs_code} if has_code else {}

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
