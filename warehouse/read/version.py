"""Reading a published version: `Warehouse` finds and checks it, `Split` gives lengths and arrays.

A job keeps the version it opened: `CURRENT` is read once. What a version consists of is asked of
its layout. Both objects pickle as (location, split name), so that spawned workers open their own
files; nothing is open until a chunk is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from warehouse.errors import CorruptError, StoreError
from warehouse.format.compatibility import foreign
from warehouse.format.data_file import REMEDY
from warehouse.format.location import Location, Remote, location_of, zarr_store
from warehouse.format.manifest import Manifest, SplitInfo, read_manifest
from warehouse.format.parquet_tables import read_table
from warehouse.format.schema import ArraySpec
from warehouse.format.versions import find_version
from warehouse.layouts.base import Layout, SampleIndex
from warehouse.layouts.cube.geometry import CubeGeometry, CubeSampleIndex
from warehouse.layouts.cube.layout import Cube
from warehouse.layouts.features import Feature
from warehouse.layouts.registry import layout_of
from warehouse.read.chunks import ChunkReader, SplitSource, Verify
from warehouse.read.version_files import Access, VersionFiles

if TYPE_CHECKING:
    import xarray

__all__ = ["Split", "Warehouse"]


class Warehouse:
    """One published version.

    Parameters
    ----------
    location
        Where the version lies: a folder, or a prefix of an object store. `Warehouse.open` finds it.

    Examples
    --------
    >>> train = Warehouse.open("artifacts/tensor_warehouse").split("train")  # doctest: +SKIP
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.manifest: Manifest = read_manifest(location)
        self.layout: Layout = layout_of(self.manifest)
        self.stored_files = VersionFiles(location, self.manifest)

    @classmethod
    def open(cls, path: Any) -> Warehouse:
        """Open a published version.

        Parameters
        ----------
        path
            A root, whose CURRENT is followed, a version's folder, or its manifest.json: as a path,
            as a URL (s3://, gs://, az://, http://, https://) or as an obstore store.

        Raises
        ------
        NotAWarehouseError
            If there is no published version.
        CorruptError
            If the version disagrees with its checksums.
        """
        return cls(find_version(location_of(path)))

    @property
    def folder(self) -> Path:
        """The version's folder. Raises StoreError for one that is not on a local file system."""
        if isinstance(self.location, Remote):
            raise StoreError(
                "this operation requires a local copy of the version",
                where=self.location,
                remedy="copy its folder to a local disk and open the copy",
            )
        return self.location

    @property
    def version(self) -> str:
        """The name of the version."""
        return self.manifest.version

    @property
    def splits(self) -> list[str]:
        """The names of its splits."""
        return list(self.manifest.splits)

    @property
    def store(self) -> Location:
        """The plain Zarr v3 store."""
        return self.stored_files.store

    @property
    def cube(self) -> CubeGeometry | None:
        """The cube that the version holds, None for other layouts."""
        return self.layout.geometry if isinstance(self.layout, Cube) else None

    def split(self, name: str) -> Split:
        """One split. Raises StoreError for a split that this version does not have."""
        if name not in self.manifest.splits:
            raise StoreError(
                f"no split {name!r}",
                where=self.location,
                expected=f"one of {', '.join(self.splits)}",
            )
        return Split(self, name)

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A table of the version (files.parquet, samples.parquet), its checksum compared."""
        return read_table(self.location, self.manifest, name, columns)

    def files(self, array: str) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Sizes and seals of an array's files ("train/image"), by stored chunk.

        Raises CorruptError when the table of files has gaps.
        """
        return self.stored_files.sizes_and_seals(array)

    def cube_table(self, name: str) -> NDArray[Any]:
        """A small array of a cube, checked.

        Parameters
        ----------
        name
            `split` (uint8 [block grid]) or `valid_share` (float32 [inner grid]).

        Raises
        ------
        StoreError
            If the version holds no cube.
        CorruptError
            If the array's file differs from the one that was published.
        """
        if not isinstance(self.layout, Cube):
            raise self.not_a_cube()

        return self.layout.small_array(name, self.stored_files.read_array)

    def not_a_cube(self) -> StoreError:
        """The error of asking a version of another layout for what only a cube has."""
        what = f"this version holds {self.layout.name}, not a cube"
        return StoreError(what, where=self.location)

    def __reduce__(self) -> tuple[Any, ...]:
        return Warehouse, (self.location,)

    def __repr__(self) -> str:
        counts = (f"{name}: {info.samples}" for name, info in self.manifest.splits.items())
        return f"Warehouse({self.version}, {', '.join(counts)})"


class Split:
    """One split of a version: its length, its arrays, and readers of its stored chunks."""

    def __init__(self, warehouse: Warehouse, name: str) -> None:
        self.warehouse, self.name = warehouse, name
        self.info: SplitInfo = warehouse.manifest.splits[name]
        self.specs: dict[str, ArraySpec] = warehouse.layout.specs(warehouse.manifest, name)

    @property
    def group(self) -> str:
        """The Zarr group that its arrays lie in."""
        return self.warehouse.layout.group(self.name)

    @cached_property
    def sample_index(self) -> SampleIndex:
        """Where its samples lie.

        Raises CorruptError when a table that this depends on differs from the published one.
        """
        warehouse = self.warehouse
        read_array = warehouse.stored_files.read_array

        return warehouse.layout.sample_index(warehouse.manifest, self.name, read_array)

    @cached_property
    def source(self) -> SplitSource:
        """What readers must know of the split."""
        layout = self.warehouse.layout

        return SplitSource(
            files=self.warehouse.stored_files,
            name=self.name,
            group=self.group,
            specs=self.specs,
            stored_specs={name: layout.stored_spec(spec) for name, spec in self.specs.items()},
            sample_index=self.sample_index,
            samples=len(self),
            chunks=self.info.chunks,
            origins=layout.origins(self.sample_index),
        )

    @property
    def features(self) -> tuple[Feature, ...]:
        """A cube's features, the columns of `data`'s last axis; none for other layouts."""
        return self.warehouse.layout.features

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(t, y, x) of each sample's first voxel in the cube, int64 [n, 3].

        Raises StoreError for other layouts than cubes.
        """
        return self._cube_index.origins(np.asarray(indices))

    @cached_property
    def valid_share(self) -> NDArray[np.float32]:
        """Share of valid values of each sample, float32 [samples].

        Raises StoreError for other layouts than cubes.
        """
        return self._cube_index.gather(self.warehouse.cube_table("valid_share"))

    @property
    def _cube_index(self) -> CubeSampleIndex:
        if not isinstance(self.sample_index, CubeSampleIndex):
            raise self.warehouse.not_a_cube()
        return self.sample_index

    def __len__(self) -> int:
        return self.info.samples

    @property
    def shard_samples(self) -> int:
        """Samples that a stored chunk has room for."""
        return self.info.shard_samples

    @property
    def chunk_sizes(self) -> list[int]:
        """Samples of the split in each of its stored chunks."""
        return self.sample_index.chunk_sizes

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by label."""
        return list(self.warehouse.manifest.class_names)

    @property
    def arrays(self) -> list[str]:
        """The names of its arrays."""
        return list(self.specs)

    @property
    def max_boxes(self) -> int | None:
        """Box slots of a picture; None where there are no boxes."""
        return self.specs["box"].shape[1] if "box" in self.specs else None

    def array(self, name: str) -> Any:
        """The zarr.Array of that name, read only.

        Untyped, since indexing a zarr.Array is typed as a union of everything it might return.
        Raises StoreError for an array that this split does not have.
        """
        import zarr

        if name not in self.specs:
            raise StoreError(
                f"no array {name!r}",
                where=f"{self.warehouse.location}, split {self.name}",
                expected=f"one of {', '.join(self.arrays)}",
            )

        store, prefix = zarr_store(self.warehouse.store)
        return zarr.open_array(store, path=f"{prefix}{self.group}/{name}", mode="r", zarr_format=3)

    def xarray(self) -> xarray.Dataset:
        """The split as a dataset with named dimensions, in dask chunks as large as stored ones.

        Pictures are float32 in [0, 1]. Of a cube it is the whole, since splits share its axes;
        `origins` tells where a split's samples lie in it.
        """
        warehouse = self.warehouse
        return warehouse.layout.xarray(warehouse.manifest, warehouse.store, self.name)

    def foreign(self, names: Sequence[str]) -> dict[str, str]:
        """Why arrays can be read by zarr-python only (codecs, shards, chunk grid), by name.

        An array whose zarr.json is missing counts as one of ours: our own reader goes by the
        manifest and the seals. Raises CorruptError for a zarr.json that does not parse.
        """
        found = {}
        for name in names:
            path = self.warehouse.store / self.group / name / "zarr.json"
            try:
                reason = foreign(json.loads(path.read_bytes()), self.specs[name])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise CorruptError(
                    "an array's metadata do not parse",
                    where=path,
                    found=f"{error}"[:160],
                    remedy=REMEDY,
                ) from None
            if reason is not None:
                found[name] = reason

        return found

    def reader(
        self, *, access: Access = "mmap", verify: Verify = "first_touch", keep: int = 64
    ) -> ChunkReader:
        """A reader for arrays of our codecs; `warehouse.read.zarr_python` has the one for any."""
        return ChunkReader(self.source, access=access, verify=verify, keep=keep)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_split, (self.warehouse.location, self.name)

    def __repr__(self) -> str:
        return (
            f"Split({self.warehouse.version}/{self.name}, "
            f"{len(self)} samples in {len(self.chunk_sizes)} chunks)"
        )


def _open_split(location: Location, name: str) -> Split:
    return Warehouse(location).split(name)
