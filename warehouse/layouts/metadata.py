"""zarr.json files of a version: groups, arrays and consolidated metadata through zarr-python.

Chunk files are there already.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from warehouse.format.schema import ArraySpec
from warehouse.write.bake import BuildPlan

__all__ = ["consolidated", "create_array", "write_pictures"]


@contextlib.contextmanager
def consolidated(
    store: Path, groups: Sequence[str], attributes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The open groups, by name, to be filled.

    At the end their metadata and the root's are consolidated. attributes: of the root.
    """
    import zarr

    with warnings.catch_warnings():
        # Zarr v3 has consolidated metadata in practice but not yet in the specification, and says
        # so each time.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        root = zarr.open_group(store, mode="a", zarr_format=3)
        root.attrs.update(attributes)
        yield {name: root.create_group(name) for name in groups}
        for name in groups:
            zarr.consolidate_metadata(store, path=name, zarr_format=3)
        zarr.consolidate_metadata(store, zarr_format=3)


def write_pictures(plan: BuildPlan, store: Path) -> None:
    """A group a split, its arrays as planned."""
    shared = {"class_names": list(plan.class_names), "layout": "pictures", "version": plan.version}
    with consolidated(
        store, [split.name for split in plan.splits], shared | {"summary": plan.summary}
    ) as groups:
        for split in plan.splits:
            groups[split.name].attrs.update(
                shared | {"split": split.name, "summary": plan.group_summaries[split.name]}
            )
            for spec in split.specs:
                create_array(groups[split.name], spec)


def create_array(group: Any, spec: ArraySpec) -> None:
    """One array's zarr.json in an open group; its spec has the shapes on disk."""
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

    from warehouse.format.inner_chunks import fill_value

    codec = spec.codec
    compressors: list[Any] = [Crc32cCodec()]
    if codec.cname is not None:
        shuffle = ("noshuffle", "shuffle", "bitshuffle")[int(codec.shuffle)]
        blosc = BloscCodec(
            typesize=codec.typesize,
            cname=codec.cname,
            clevel=codec.clevel,
            shuffle=shuffle,
            blocksize=codec.blocksize,
        )  # type: ignore[arg-type]
        compressors.insert(0, blosc)
    group.create_array(
        spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.inner or spec.chunk,
        shards=spec.chunk if spec.inner else None,
        serializer=BytesCodec(endian=None if spec.dtype in {"uint8", "bool"} else "little"),
        compressors=compressors,
        filters=None,
        fill_value=fill_value(spec),
        dimension_names=spec.dims,
        attributes=dict(spec.attrs),
        config={"write_empty_chunks": True},
    )
