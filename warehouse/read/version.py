"""Reading a published version: `Warehouse` finds and checks it, `Split` gives lengths, arrays and
stored chunks.

A job keeps the version it opened: `CURRENT` is read once. Invariant: a file's size and seal are
compared with files.parquet when it is opened, and a sample's crc32c before it is first decoded
(`verify`: always, first_touch, off). Objects pickle as (folder, split name), so that spawned
workers open their own handles; nothing is open until a chunk is read.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from warehouse.errors import CorruptError, StoreError
from warehouse.format import manifest as tables
from warehouse.format.compatibility import foreign
from warehouse.format.inner_chunks import chunk_key
from warehouse.format.location import Location, Remote, location_of
from warehouse.format.manifest import Manifest, read_manifest, read_table, safe_relative
from warehouse.format.schema import ArraySpec, Codec
from warehouse.format.stored_chunk import REMEDY, StoredChunk
from warehouse.format.versions import find_version
from warehouse.layouts.base import EvenPlaces, Places
from warehouse.layouts.cube_geometry import (
    LABELS,
    VALID_SHARE,
    Cube,
    CubePlaces,
    Feature,
    cube_arrays,
)
from warehouse.settings import SPLIT_NAMES

__all__ = ["ChunkReader", "Split", "Warehouse"]

Access = Literal["mmap", "pread"]
Verify = Literal["first_touch", "always", "off"]


class Warehouse:
    """One published version. `open` takes a root (its CURRENT is followed), a version folder, or a
    manifest.json.

    location: where the version lies: a folder, or a prefix of an object store.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.manifest: Manifest = read_manifest(location)
        self.cube: Cube | None = (
            Cube.of(self.manifest.cube) if self.manifest.cube is not None else None
        )
        self._files: Any = None

    @classmethod
    def open(cls, path: Any) -> Warehouse:
        """path: str or Path; a URL (s3://, gs://, az://, http://, https://) or an obstore store is
        read where it lies.

        Raises NotAWarehouseError where there is no published version, CorruptError where it
        disagrees with its digests.
        """
        return cls(find_version(location_of(path)))

    @property
    def folder(self) -> Path:
        """The version's folder. Raises StoreError for one that is not on a local file system."""
        if isinstance(self.location, Remote):
            raise StoreError(
                "this needs the version on a local disk",
                where=self.location,
                remedy="copy its folder there and open the copy",
            )
        return self.location

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def splits(self) -> list[str]:
        return list(self.manifest.splits)

    @property
    def store(self) -> Location:
        """The plain Zarr v3 store."""
        return self.location / tables.STORE

    def split(self, name: str) -> Split:
        """Raises StoreError for a split this version does not have."""
        if name not in self.manifest.splits:
            raise StoreError(
                f"no split {name!r}",
                where=self.location,
                expected=f"one of {', '.join(self.splits)}",
            )
        return Split(self, name)

    def table(self, name: str, columns: list[str] | None = None) -> Any:
        """A pyarrow table of the version (files.parquet, samples.parquet), its digest checked."""
        return read_table(self.location, self.manifest, name, columns)

    def files(self, array: str) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """(sizes, seals) of an array's files ("train/image") by stored chunk.

        Raises CorruptError when the table has gaps.
        """
        if self._files is None:
            with tables.open_table(self.location, self.manifest, tables.FILES) as table:
                self._files = _sizes_and_seals(table)
        sizes, seals = self._files.get(array, (np.empty(0, np.int64), np.empty(0, np.uint32)))
        if not sizes.all():
            raise CorruptError(
                "the table of files has gaps", where=self.location / tables.FILES, found=array
            )
        return sizes, seals

    def cube_table(self, name: str) -> NDArray[Any]:
        """A small array of a cube, checked.

        `split` (u1 [block grid]) or `valid_share` (f4 [inner grid]). Raises CorruptError.
        """
        assert self.cube is not None
        spec = {
            spec.name: spec
            for spec in (LABELS.spec(self.cube.layout), VALID_SHARE.spec(self.cube.layout))
        }[name]
        sizes, seals = self.files(f"cube/{name}")
        path, expected = chunk_path(self.store, "cube", spec, 0), (int(sizes[0]), int(seals[0]))
        return open_stored(path, spec, spec.shape[0], expected, "pread").read_all()

    def __reduce__(self) -> tuple[Any, ...]:
        return Warehouse, (self.location,)

    def __repr__(self) -> str:
        return (
            f"Warehouse({self.version}, "
            + ", ".join(f"{name}: {info['samples']}" for name, info in self.manifest.splits.items())
            + ")"
        )


def _sizes_and_seals(table: Any) -> dict[str, tuple[NDArray[np.int64], NDArray[np.uint32]]]:
    """array -> (sizes, seals) by stored chunk, size 0 where the table has no file.

    Memory: 12 bytes a file, and a row group.
    """
    out: dict[str, tuple[NDArray[np.int64], NDArray[np.uint32]]] = {}
    lengths: dict[str, int] = {}
    most = table.metadata.num_rows
    for batch in table.iter_batches(
        1 << 13, columns=["array", "chunk", "size", "seal"], use_threads=False
    ):
        array = batch["array"]
        names, codes = (
            array.dictionary.to_pylist(),
            np.where(_present(array), _values(array.indices, np.int32), -1),
        )
        columns = [
            _values(batch[name], dtype)
            for name, dtype in (("chunk", np.int64), ("size", np.int64), ("seal", np.uint32))
        ]
        for code in np.unique(codes[codes >= 0]).tolist():
            chunk, size, seal = (column[codes == code] for column in columns)
            if not 0 <= chunk.min() <= chunk.max() < most:
                raise CorruptError(
                    "a stored chunk's number is out of range",
                    where=tables.FILES,
                    expected=f"below {most}",
                )
            # np.zeros of many pages costs nothing until they are written.
            sizes, seals = out.setdefault(
                names[code], (np.zeros(most, np.int64), np.zeros(most, np.uint32))
            )
            sizes[chunk], seals[chunk] = size, seal
            lengths[names[code]] = max(lengths.get(names[code], 0), int(chunk.max()) + 1)
    return {
        name: (sizes[: lengths[name]], seals[: lengths[name]])
        for name, (sizes, seals) in out.items()
    }


def _values(column: Any, dtype: Any) -> NDArray[Any]:
    """The values of an Arrow column, arbitrary where it is null.

    By its buffer: Arrow's own functions load 40 MB of code.
    """
    return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column)]


def _present(column: Any) -> NDArray[np.bool_]:
    """True where an Arrow column is not null."""
    if column.buffers()[0] is None:
        return np.ones(len(column), bool)
    bits = np.unpackbits(np.frombuffer(column.buffers()[0], np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)


class Split:
    """One split of a version.

    `len()`, `chunk_sizes`, zarr arrays, an xarray view, checked stored chunks.
    """

    def __init__(self, warehouse: Warehouse, name: str) -> None:
        self.warehouse, self.name = warehouse, name
        self.info: dict[str, Any] = warehouse.manifest.splits[name]
        self.specs: dict[str, ArraySpec] = {
            array: _spec(array, raw, self.info) for array, raw in warehouse.manifest.arrays.items()
        }
        if warehouse.cube is not None:
            compressor = self.specs["data"].codec.cname or "none"
            self.specs = {
                spec.name: spec
                for spec in cube_arrays(warehouse.cube.layout, compressor, len(self))
            }

    @property
    def group(self) -> str:
        """The Zarr group its arrays lie in: its own, or the cube that all splits share."""
        return self.name if self.warehouse.cube is None else "cube"

    @cached_property
    def places(self) -> Places:
        """Where its samples lie.

        Raises CorruptError when a cube's labels disagree with their digest.
        """
        if self.warehouse.cube is None:
            return EvenPlaces(len(self), self.shard_samples)
        return CubePlaces(
            self.warehouse.cube.layout,
            self.warehouse.cube_table("split"),
            SPLIT_NAMES.index(self.name),
        )

    @property
    def _cube_places(self) -> CubePlaces:
        if not isinstance(self.places, CubePlaces):
            raise StoreError(
                "this version holds pictures, not a cube", where=self.warehouse.location
            )
        return self.places

    @property
    def features(self) -> tuple[Feature, ...]:
        """A cube's features, the columns of `data`'s last axis; none for pictures."""
        return () if self.warehouse.cube is None else self.warehouse.cube.features

    def origins(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """(t, y, x) of each sample's first voxel in the cube, int64 [n, 3].

        Raises StoreError for pictures.
        """
        return self._cube_places.origins(np.asarray(indices))

    @cached_property
    def valid_share(self) -> NDArray[np.float32]:
        """Share of valid values of each sample, float32 [samples].

        Raises StoreError for pictures.
        """
        places = self._cube_places
        shares = places.layout.by_chunk(self.warehouse.cube_table("valid_share"), np.float32(0))
        chosen: NDArray[np.float32] = shares[places.numbers[places.chunks], places.slots]
        return chosen

    def __len__(self) -> int:
        return int(self.info["samples"])

    @property
    def shard_samples(self) -> int:
        return int(self.info["shard_samples"])

    @property
    def chunk_sizes(self) -> list[int]:
        """Samples in each stored chunk. Pictures: all but the last are `shard_samples`.

        Cubes: chunks without samples are left out.
        """
        return self.places.chunk_sizes

    @property
    def class_names(self) -> list[str]:
        return list(self.warehouse.manifest.class_names)

    @property
    def arrays(self) -> list[str]:
        return list(self.specs)

    @property
    def max_boxes(self) -> int | None:
        """Box slots of a picture; None for layouts without boxes."""
        return self.specs["box"].shape[1] if "box" in self.specs else None

    def array(self, name: str) -> Any:
        """The zarr.Array, read only. Raises StoreError for an array this split does not have."""
        import zarr

        if name not in self.specs:
            raise StoreError(
                f"no array {name!r}",
                where=f"{self.warehouse.location}, split {self.name}",
                expected=f"one of {', '.join(self.arrays)}",
            )
        store, prefix = zarr_store(self.warehouse.store)
        return zarr.open_array(store, path=f"{prefix}{self.group}/{name}", mode="r", zarr_format=3)

    def xarray(self) -> Any:
        """The split as an xarray.Dataset in stored-chunk-sized dask chunks; pictures float32 in [0,
        1], named dimensions.

        Of a cube: the whole of it, since splits share its axes; `origins` gives a split's place in
        it. Feature groups are chunks apart: a feature is read without the others' groups.
        """
        import xarray

        store, prefix = zarr_store(self.warehouse.store)
        if self.warehouse.cube is not None:
            layout = self.warehouse.cube.layout
            sizes = dict(
                zip(("time", "y", "x", "feature"), (*layout.shard, layout.group), strict=True)
            )
            return xarray.open_zarr(store, group=f"{prefix}cube", chunks=sizes, decode_coords="all")
        raw = xarray.open_zarr(
            store,
            group=f"{prefix}{self.name}",
            chunks={"sample": self.shard_samples},
            mask_and_scale=False,
        )
        image = raw["image"]
        scale = image.attrs.pop("scale_factor", None)
        picture = image.astype("float32")
        raw["image"] = (picture if scale is None else picture * np.float32(scale)).assign_attrs(
            image.attrs
        )
        return raw

    def foreign(self, names: Sequence[str]) -> dict[str, str]:
        """Why arrays of these can be read by zarr-python only (codecs, shards, chunk grid), by
        name. Raises CorruptError.

        An array whose zarr.json is missing counts as ours: the fast path goes by the manifest and
        the seals.
        """
        found = {}
        for name in names:
            path = self.warehouse.store / self.group / name / "zarr.json"
            try:
                why = foreign(json.loads(path.read_bytes()), self.specs[name])
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise CorruptError(
                    "an array's metadata do not parse",
                    where=path,
                    found=f"{error}"[:160],
                    remedy=REMEDY,
                ) from None
            if why is not None:
                found[name] = why
        return found

    def reader(
        self, *, access: Access = "mmap", verify: Verify = "first_touch", keep: int = 64
    ) -> ChunkReader:
        """For arrays of our codecs; warehouse/read/zarr_python.py has the one for any."""
        return ChunkReader(self, access=access, verify=verify, keep=keep)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_split, (self.warehouse.location, self.name)

    def __repr__(self) -> str:
        return f"Split({self.warehouse.version}/{self.name}, {len(self)} samples in {len(self.chunk_sizes)} chunks)"


def _open_split(location: Location, name: str) -> Split:
    return Warehouse(location).split(name)


def zarr_store(location: Location) -> tuple[Any, str]:
    """(what zarr opens, prefix of its keys).

    The folder itself, or zarr's view of an object store.
    """
    if not isinstance(location, Remote):
        return location, ""
    from zarr.storage import ObjectStore

    return ObjectStore(location.store, read_only=True), f"{location.key}/"


def _spec(name: str, raw: dict[str, Any], info: dict[str, Any]) -> ArraySpec:
    row, size = tuple(raw["row"]), int(info["shard_samples"])
    inner = (1, *row) if raw["sharded"] else None
    return ArraySpec(
        name,
        (int(info["samples"]), *row),
        raw["dtype"],
        tuple(raw["dims"]),
        (size, *row),
        inner,
        Codec(**raw["codec"]),
    )


class ChunkReader:
    """Checked access to a split's files for any number of threads.

    Keeps at most `keep` files open (LRU).
    """

    def __init__(self, split: Split, *, access: Access, verify: Verify, keep: int) -> None:
        self.split, self.access, self.verify, self.keep = split, access, verify, keep
        self._open: OrderedDict[tuple[str, int], StoredChunk] = OrderedDict()
        self._expected: dict[str, tuple[NDArray[np.int64], NDArray[np.uint32]]] = {}
        self._lock = threading.Lock()
        self._opening: dict[tuple[str, int], threading.Lock] = {}
        self.chunks_opened = 0

    def fill(
        self, names: Sequence[str], indices: NDArray[np.int64], out: Mapping[str, NDArray[Any]]
    ) -> tuple[int, int]:
        """Write samples `indices` of the split into out[name] ([len(indices), ...]); (samples
        decoded, bytes read).

        Every sample is decoded once, straight into its row. Raises CorruptError naming the file.
        """
        chunks, rows = self.split.places.locate(indices)
        size = 0
        for chunk in np.unique(chunks).tolist():
            at = np.flatnonzero(chunks == chunk)
            for name in names:
                if self.split.specs[name].inner is None:
                    out[name][at] = self.small(name, chunk)[rows[at]]
                else:
                    size += self.read_rows(name, chunk, rows[at], out[name], at)
        return len(indices), size

    def follow(self, plans: Iterator[Any]) -> Iterator[Any]:
        """The batch plans of an epoch on their way to being filled.

        Readers that fetch ahead look at them here.
        """
        return plans

    def chunk(self, name: str, chunk: int) -> StoredChunk:
        """The open file of a stored chunk, its size checked now.

        Raises CorruptError naming the file.
        """
        key = (name, chunk)
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
            else:
                opening = self._opening.setdefault(key, threading.Lock())
        if found is not None:
            found.check_size()
            return found
        # Neighbouring batches share a chunk, so that all threads come to a new one at once: the
        # first opens it, the others wait.
        with opening:
            with self._lock:
                found = self._open.get(key)
            if found is not None:
                return found
            found = self.open_chunk(name, chunk)
            with self._lock:
                self._open[key] = found
                self._opening.pop(key, None)
                self.chunks_opened += 1
                while len(self._open) > self.keep:
                    self._open.popitem(last=False)
        return found

    def locate(
        self, name: str, chunk: int
    ) -> tuple[Location, int | NDArray[np.int64], tuple[int, int]]:
        """(file, its samples, (size, seal)) of a stored chunk of the split.

        Raises CorruptError when the table does not know it.
        """
        split, spec = self.split, self.split.specs[name]
        with self._lock:
            if name not in self._expected:
                self._expected[name] = split.warehouse.files(f"{split.group}/{name}")
            sizes, seals = self._expected[name]
        stored = split.places.stored(chunk) if 0 <= chunk < split.info["chunks"] else len(sizes)
        if stored >= len(sizes):
            where = f"{split.warehouse.location}, {split.name}/{name}, chunk {chunk}"
            raise CorruptError("a stored chunk is not in the table of files", where=where)
        path = chunk_path(split.warehouse.store, split.group, spec, stored)
        return path, split.places.present(chunk), (int(sizes[stored]), int(seals[stored]))

    def open_chunk(self, name: str, chunk: int) -> StoredChunk:
        path, rows, expected = self.locate(name, chunk)
        return open_stored(path, self.split.specs[name], rows, expected, self.access)

    def read_rows(
        self,
        name: str,
        chunk: int,
        rows: NDArray[np.int64],
        out: NDArray[Any],
        at: NDArray[np.int64],
    ) -> int:
        """Decode samples `rows` (places within the chunk) of a sharded array into out[at].

        Bytes read.
        """
        return self.chunk(name, chunk).read_rows(
            rows.tolist(), out, at.tolist(), verify=self.verify
        )

    def small(self, name: str, chunk: int) -> NDArray[Any]:
        """A plain array's whole stored chunk, [rows, ...], kept while its file is among the open
        ones. Do not write into it.
        """
        return self.chunk(name, chunk).read_all()

    def close(self) -> None:
        with self._lock:
            self._open.clear()


def open_stored(
    path: Location, spec: ArraySpec, rows: Any, expected: tuple[int, int], access: str
) -> StoredChunk:
    """A StoredChunk of a local file, or of an object fetched whole. Raises CorruptError."""
    memory = None
    if isinstance(path, Remote):
        memory = memoryview(bytearray(expected[0]))
        path.read_into(memory)
    return StoredChunk(path, spec, rows, expected, access, memory)


def chunk_path(store: Location, split: str, spec: ArraySpec, chunk: int) -> Location:
    return store / safe_relative(f"{split}/{spec.name}/{chunk_key(spec, chunk)}", store)
