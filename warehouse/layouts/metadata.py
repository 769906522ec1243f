"""The zarr.json files of a version: groups, arrays and consolidated metadata through zarr-python.

The files of the chunks are there already when these are written.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from warehouse.format.schema import ArraySpec
from warehouse.layouts.plan import BuildPlan, SplitPlan

if TYPE_CHECKING:
    import zarr

__all__ = ["consolidated", "create_array", "write_split_groups"]

SHUFFLES: tuple[Literal["noshuffle", "shuffle", "bitshuffle"], ...] = (
    "noshuffle",
    "shuffle",
    "bitshuffle",
)


@contextlib.contextmanager
def consolidated(
    store: Path, groups: Sequence[str], attributes: Mapping[str, Any]
) -> Iterator[dict[str, zarr.Group]]:
    """Yield the open groups, by name, to be filled.

    At the end their metadata and the root's are consolidated. `attributes` are those of the root.
    """
    import zarr

    with warnings.catch_warnings():
        # Zarr v3 has consolidated metadata in practice but not yet in the specification, and warns
        # of it each time.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)

        root = zarr.open_group(store, mode="a", zarr_format=3)
        root.attrs.update(attributes)
        yield {name: root.create_group(name) for name in groups}

        for name in groups:
            zarr.consolidate_metadata(store, path=name, zarr_format=3)
        zarr.consolidate_metadata(store, zarr_format=3)


def write_split_groups(
    plan: BuildPlan,
    store: Path,
    root_attributes: Mapping[str, Any],
    group_attributes: Callable[[SplitPlan], Mapping[str, Any]],
) -> None:
    """Write a group for each split, with its arrays as planned."""
    names = [split.name for split in plan.splits]

    with consolidated(store, names, root_attributes) as groups:
        for split in plan.splits:
            groups[split.name].attrs.update(group_attributes(split))
            for spec in split.specs:
                create_array(groups[split.name], spec)


def create_array(group: zarr.Group, spec: ArraySpec) -> None:
    """Write one array's zarr.json in an open group; `spec` has the shapes on disk."""
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

    from warehouse.format.inner_chunks import fill_value

    codec = spec.codec
    compressors: list[Any] = [Crc32cCodec()]
    if codec.cname is not None:
        blosc = BloscCodec(
            typesize=codec.typesize,
            cname=codec.cname,
            clevel=codec.clevel,
            shuffle=SHUFFLES[int(codec.shuffle)],
            blocksize=codec.blocksize,
        )
        compressors.insert(0, blosc)

    one_byte = spec.dtype in {"uint8", "bool"}
    attributes: dict[str, Any] = dict(spec.attrs)
    group.create_array(
        spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.inner or spec.chunk,
        shards=spec.chunk if spec.inner else None,
        serializer=BytesCodec(endian=None if one_byte else "little"),
        compressors=compressors,
        filters=None,
        fill_value=fill_value(spec),
        dimension_names=spec.dims,
        attributes=attributes,
        config={"write_empty_chunks": True},
    )
