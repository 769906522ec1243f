"""Versions with codecs of others, and versions that are not on this disk.

The same arrays, the same order, the same loud errors.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from fakes import SMALL, build, numbers, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import LocalStore, MemoryStore
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from utils.loader import ChunkLoader
from utils.loading.stores import choose_store
from utils.samplers import ChunkBatchSampler, RandomBatchSampler
from warehouse import Warehouse
from warehouse.errors import ConfigError, CorruptError, NotAWarehouseError, StoreError
from warehouse.format.manifest import (
    FILES,
    read_manifest,
    write_manifest,
)
from warehouse.format.parquet_tables import FILES_SCHEMA, write_table
from warehouse.read.version import Split
from warehouse.read.zarr_python import ZarrPythonReader
from warehouse.settings import BuildSettings

pytestmark = pytest.mark.filterwarnings("ignore:batch_size")
CODECS: dict[str, list[Any]] = {
    "zstd": [BytesCodec(), ZstdCodec(level=1)],
    "gzip and crc32c": [BytesCodec(), GzipCodec(level=1), Crc32cCodec()],
    "blosc without crc32c": [BytesCodec(), BloscCodec(cname="zstd", clevel=1)],
    "nothing": [BytesCodec()],
    "ours": [BytesCodec(), BloscCodec(cname="lz4", clevel=9), Crc32cCodec()],
}


def reencode(
    warehouse: Warehouse, path: str, codecs: list[Any], chunk: tuple[int, ...]
) -> Warehouse:
    """The version with array `path` stored by zarr-python with other codecs and chunks, and tables
    that agree with it.
    """
    folder = warehouse.store / path
    old = zarr.open_array(folder, mode="r")
    values, attributes, fill, dims = (
        old[:],
        dict(old.attrs),
        old.fill_value,
        old.metadata.dimension_names,
    )
    shutil.rmtree(folder)
    array_bytes = next(
        (codec for codec in codecs if isinstance(codec, (ShardingCodec, BytesCodec))), BytesCodec()
    )
    array = zarr.create_array(
        warehouse.store,
        name=path,
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        fill_value=fill,
        serializer=array_bytes,
        compressors=[codec for codec in codecs if codec is not array_bytes] or None,
        filters=None,
        attributes=attributes,
        dimension_names=dims,
        config={"write_empty_chunks": True},
    )
    array[:] = values
    rows = [
        row
        for row in pq.read_table(warehouse.folder / FILES).to_pylist()
        if f"/{path}/" not in row["path"]
    ]
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            row = {
                "path": file.relative_to(warehouse.folder).as_posix(),
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            rows.append(row | {"array": None, "chunk": None, "seal": None})
    columns = {key: [row[key] for row in rows] for key in FILES_SCHEMA.names}
    digest = write_table(warehouse.folder / FILES, columns, FILES_SCHEMA)
    manifest = read_manifest(warehouse.folder)
    write_manifest(
        warehouse.folder, manifest.model_copy(update={"tables": manifest.tables | {FILES: digest}})
    )
    return Warehouse.open(warehouse.folder)


def library(split: Split) -> ZarrPythonReader:
    return ZarrPythonReader(split.source, verify="first_touch", keep=8)


def expected(name: str, count: int, chosen: BuildSettings = SMALL) -> np.ndarray:
    return np.stack([sample(number, chosen)[name] for number in numbers("train", count)])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[BuildSettings, int, list[Any], tuple[int, ...]]:
    """(recipe, samples, codecs, stored chunk of `image`).

    Sharded, nested or plain, with edges that do not divide.
    """
    count, height, width = (
        draw(st.integers(1, 23)),
        draw(st.integers(8, 19)),
        draw(st.integers(8, 19)),
    )
    dtype = draw(st.sampled_from(["uint8", "float16", "float32"]))
    chosen = BuildSettings(
        target_size=(height, width), max_boxes=2, shard_samples=draw(st.integers(1, 9)), dtype=dtype
    )
    inner = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 3])),
        draw(st.integers(5, height)),
        draw(st.sampled_from([width, 7])),
    )
    codecs = CODECS[draw(st.sampled_from(sorted(CODECS)))]
    kind = draw(st.sampled_from(["plain", "sharded", "index first", "nested"]))
    if kind == "plain":
        return chosen, count, codecs, inner
    place = "start" if kind == "index first" else "end"
    per_shard = draw(st.integers(1, 4))
    shard = (inner[0] * per_shard, *(draw(st.integers(1, 2)) * side for side in inner[1:]))
    sharding = ShardingCodec(chunk_shape=inner, codecs=codecs, index_location=place)
    if kind == "nested":
        return (
            chosen,
            count,
            [ShardingCodec(chunk_shape=shard, codecs=[sharding])],
            (2 * shard[0], *shard[1:]),
        )
    return chosen, count, [sharding], shard


@given(layouts(), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_library_gives_the_arrays_our_decoder_gives(
    tmp_path_factory: pytest.TempPathFactory, layout: Any, random: Any
) -> None:
    chosen, count, codecs, chunk = layout
    warehouse = build(tmp_path_factory.mktemp("drawn"), {"train": count}, chosen)
    split = warehouse.split("train")
    order = np.array(random.sample(range(count), random.randint(1, count)))

    def read(reader: Any) -> tuple[dict[str, np.ndarray], int]:
        out = {
            name: np.empty((len(order), *split.specs[name].shape[1:]), split.specs[name].dtype)
            for name in split.arrays
        }
        return out, reader.fill(split.arrays, order, out)[0]

    ours, _ = read(split.reader())
    same, decoded = read(library(split))
    assert decoded == len(order), "an inner chunk of ours is one sample"
    other, decoded = read(library(reencode(warehouse, "train/image", codecs, chunk).split("train")))
    assert decoded >= len(order)
    for name in split.arrays:
        assert np.array_equal(ours[name], expected(name, count, chosen)[order])
        assert np.array_equal(ours[name], same[name])
        assert np.array_equal(ours[name], other[name])


@pytest.fixture(scope="module")
def zstd(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """`small`, its pictures in shards of 8 with zstd and no crc32c."""
    row = (3, *SMALL.target_size)
    sharding = ShardingCodec(chunk_shape=(1, *row), codecs=CODECS["zstd"])
    return reencode(build(tmp_path_factory.mktemp("zstd")), "train/image", [sharding], (8, *row))


@pytest.mark.parametrize("engine", ["inline", "thread", "spawn"])
@pytest.mark.parametrize("store", ["library", "memory"])
def test_foreign_codecs_load_through_every_engine_in_the_same_order(
    small: Warehouse, zstd: Warehouse, engine: Any, store: Any
) -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 3}
    with (
        ChunkLoader(
            zstd.split("train"), engine=engine, num_workers=2, store=store, **options
        ) as loader,
        ChunkLoader(small.split("train"), engine="inline", store="mmap", **options) as reference,
    ):
        for got, want in zip(loader, reference, strict=True):
            assert all(torch.equal(got[name], want[name]) for name in want)
        assert (loader.order_digest, loader.stats.decoded) == (reference.order_digest, 29)


@pytest.mark.parametrize("store", ["mmap", "pread", "stream"])
def test_a_store_that_knows_only_our_codecs_refuses_others_by_name(
    zstd: Warehouse, store: Any
) -> None:
    with pytest.raises(ConfigError, match=r"'image': its codecs are bytes \| zstd.*library"):
        ChunkLoader(zstd.split("train"), 4, store=store)


def test_auto_takes_the_library_for_foreign_codecs_that_do_not_fit_and_says_why(
    zstd: Warehouse,
) -> None:
    split = zstd.split("train")
    sampler = ChunkBatchSampler(split.chunk_sizes, 4)
    assert choose_store("auto", split, split.arrays, sampler, available=10**9).store == "memory"
    choice = choose_store("auto", split, split.arrays, sampler, available=10_000, kind="ext4")
    assert choice.store == "library"
    assert "zstd" in choice.reason
    assert (
        choose_store("auto", split, ["label"], sampler, available=0, kind="nfs").store == "stream"
    ), "labels are of our codecs"


def test_the_chunk_sizes_are_those_of_zarr_s_grid(tmp_path: Path) -> None:
    split = reencode(
        build(tmp_path, {"train": 11}), "train/image", CODECS["gzip and crc32c"], (4, 3, 16, 24)
    ).split("train")
    reader = library(split)
    assert reader.chunk_sizes == [4, 4, 3]
    out = {"image": np.empty((2, 3, 16, 24), np.uint8)}
    assert reader.fill(["image"], np.array([0, 10]), out)[0] == 7, (
        "a plain chunk of 4 and one of 3 had to be decoded for 2 samples"
    )


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap(path: Path) -> None:
    other = path.parents[3] / "0/0/0/0"
    assert other != path
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def name_of(value: Any) -> str:
    return value if isinstance(value, str) else str(value.__name__)


IMAGE, BOX, META = "train/image/c/2/0/0/0", "train/box/c/2/0/0", "train/image/zarr.json"


@pytest.mark.parametrize("remote", [False, True], ids=["local", "object store"])
@pytest.mark.parametrize(
    ("file", "damage"),
    [(IMAGE, flip), (IMAGE, cut), (IMAGE, swap), (IMAGE, Path.unlink), (META, flip), (META, cut)],
    ids=name_of,
)
def test_damage_of_foreign_files_is_a_typed_error(
    zstd: Warehouse, tmp_path: Path, damage: Any, file: str, remote: bool
) -> None:
    """zstd without crc32c.

    Only the table of files can tell a flipped bit, and zarr would fill in for a missing file.
    """
    copy = tmp_path / zstd.version
    shutil.copytree(zstd.folder, copy)
    damage(copy / "warehouse.zarr" / file)
    warehouse = Warehouse.open(LocalStore(copy) if remote else copy)
    match = r"image/c/[02]" if file.endswith("0") else r"image/zarr\.json"
    with (
        pytest.raises(CorruptError, match=match),
        ChunkLoader(warehouse.split("train"), 4, engine="thread", store="library") as loader,
    ):
        for _ in loader:
            pass


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web(small: Warehouse) -> Iterator[str]:
    """A plain HTTP server (no byte ranges) over the root of `small`."""
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=small.folder.parent)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def in_memory(folder: Path) -> MemoryStore:
    store = MemoryStore()
    for file in folder.rglob("*"):
        if file.is_file():
            store.put(file.relative_to(folder).as_posix(), file.read_bytes())
    return store


@pytest.mark.parametrize(
    "where", ["root", "version", "manifest", "local store", "memory store", "file url"]
)
def test_a_version_opens_where_it_lies(small: Warehouse, web: str, where: str) -> None:
    root = small.folder.parent
    address = {
        "root": web,
        "version": f"{web}/{small.version}",
        "manifest": f"{web}/{small.version}/manifest.json",
        "local store": LocalStore(root),
        "memory store": in_memory(root),
        "file url": root.as_uri(),
    }[where]
    warehouse = Warehouse.open(address)
    assert (warehouse.version, warehouse.manifest) == (small.version, small.manifest)
    assert warehouse.table("samples.parquet").equals(small.table("samples.parquet"))
    assert np.array_equal(warehouse.split("train").array("label")[:], expected("label", 29))


@pytest.mark.parametrize("engine", ["inline", "thread", "spawn"])
@pytest.mark.parametrize("store", ["stream", "memory"])
def test_a_version_behind_http_is_fetched_chunk_by_chunk_and_decoded_here(
    small: Warehouse, web: str, engine: Any, store: Any
) -> None:
    split = Warehouse.open(web).split("train")
    with (
        ChunkLoader(
            split, 4, engine=engine, num_workers=2, seed=1, interleave=2, store=store
        ) as loader,
        ChunkLoader(
            small.split("train"), 4, engine="inline", seed=1, interleave=2, store="mmap"
        ) as reference,
    ):
        for got, want in zip(loader, reference, strict=True):
            assert all(torch.equal(got[name], want[name]) for name in want)
        assert (loader.order_digest, loader.stats.decoded) == (reference.order_digest, 29)
        if store == "stream":
            assert loader.engine.reader.fetches == len(split.chunk_sizes)  # type: ignore[attr-defined]


def test_an_object_store_reads_through_the_library_too_each_object_once(
    small: Warehouse, web: str
) -> None:
    split = Warehouse.open(web).split("train")
    random = RandomBatchSampler(split.chunk_sizes, 9)
    with ChunkLoader(
        split, sampler=random, engine="thread", num_workers=4, store="library"
    ) as loader:
        seen = [index for batch in loader for index in batch["index"].tolist()]
        assert sorted(seen) == list(range(29))
        assert loader.stats.chunks_opened == len(split.arrays) * (1 + len(split.chunk_sizes))


def test_auto_streams_from_an_object_store_and_says_why(small: Warehouse, web: str) -> None:
    split = Warehouse.open(web).split("train")
    choice = choose_store(
        "auto", split, split.arrays, ChunkBatchSampler(split.chunk_sizes, 4), available=10_000
    )
    assert choice.store == "stream"
    assert web in choice.reason
    random = choose_store(
        "auto", split, split.arrays, RandomBatchSampler(split.chunk_sizes, 4), available=10_000
    )
    assert random.store == "library"
    for store in ("mmap", "pread"):
        with pytest.raises(ConfigError, match="local files"):
            ChunkLoader(split, 4, store=store)


@pytest.mark.parametrize("store", ["stream", "memory"])
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (IMAGE, flip),
        (IMAGE, cut),
        (IMAGE, swap),
        (IMAGE, Path.unlink),
        (BOX, flip),
        (BOX, cut),
        (BOX, Path.unlink),
    ],
    ids=name_of,
)
def test_damage_in_an_object_store_is_a_typed_error(
    small: Warehouse, tmp_path: Path, file: str, damage: Any, store: Any
) -> None:
    shutil.copytree(small.folder, tmp_path / small.version)
    damage(tmp_path / small.version / "warehouse.zarr" / file)
    split = Warehouse.open(LocalStore(tmp_path / small.version)).split("train")
    match = r"image/c/[02]" if "image" in file else "box/c/2"
    with (
        pytest.raises(CorruptError, match=match),
        ChunkLoader(split, 4, engine="thread", store=store) as loader,
    ):
        for _ in loader:
            pass


@pytest.mark.parametrize("file", ["manifest.json", "files.parquet", "samples.parquet"])
def test_tables_of_an_object_store_are_checked_with_their_digests(
    small: Warehouse, tmp_path: Path, file: str
) -> None:
    shutil.copytree(small.folder, tmp_path / small.version)
    path = tmp_path / small.version / file
    path.write_bytes(path.read_bytes().replace(b"train", b"trian", 1) + b" ")
    with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
        Warehouse.open(LocalStore(tmp_path / small.version)).table(
            "samples.parquet" if file == "manifest.json" else file
        )


def test_an_address_without_a_version_is_an_error_that_names_it(web: str, tmp_path: Path) -> None:
    with pytest.raises(NotAWarehouseError, match=f"{web}/nothing"):
        Warehouse.open(f"{web}/nothing")
    with pytest.raises(StoreError, match="soup://there"):
        Warehouse.open("soup://there/it/is")
    with pytest.raises(NotAWarehouseError, match="CURRENT"):
        Warehouse.open(LocalStore(tmp_path))
    with pytest.raises(ConfigError, match="path, URL or obstore store"):
        Warehouse.open(3)


def test_what_needs_a_local_folder_says_so(web: str) -> None:
    with pytest.raises(StoreError, match=r"local disk.*copy"):
        _ = Warehouse.open(web).folder


def test_a_password_in_a_url_is_not_shown() -> None:
    from warehouse.format.location import Remote

    assert str(Remote("https://me:secret@host/root") / "CURRENT") == "https://host/root/CURRENT"


def test_a_memory_store_is_refused_where_other_processes_would_read_it(small: Warehouse) -> None:
    split = Warehouse.open(in_memory(small.folder.parent)).split("train")
    with ChunkLoader(split, 4, engine="thread", store="stream") as loader:
        assert sorted(index for batch in loader for index in batch["index"].tolist()) == list(
            range(29)
        )
    with pytest.raises(ConfigError, match="MemoryStore"):
        pickle.dumps(split)


def test_an_unreadable_zarr_json_is_a_typed_error(tmp_path: Path) -> None:
    warehouse = build(tmp_path)
    (warehouse.store / "train/image/zarr.json").write_text("{]")
    with pytest.raises(CorruptError, match=r"image/zarr\.json"):
        ChunkLoader(warehouse.split("train"), 4)
