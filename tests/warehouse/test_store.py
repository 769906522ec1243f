"""The published store: equal through every reader, loud about every damaged byte."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from fakes import SMALL, build, numbers, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.loader import ChunkLoader
from warehouse import Warehouse, WarehouseError
from warehouse.errors import CorruptError, NotAWarehouseError, StoreError
from warehouse.inspect.verify import verify
from warehouse.settings import BuildSettings

ARRAYS = ("image", "box", "box_mask", "box_flags", "label", "letterbox")


def expected(name: str, split: str, count: int) -> np.ndarray:
    return np.stack([sample(number)[name] for number in numbers(split, count)])


@pytest.mark.parametrize("name", ARRAYS)
def test_zarr_xarray_and_tensorstore_read_what_was_baked(small: Warehouse, name: str) -> None:
    import tensorstore

    want = expected(name, "train", 29)
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{small.store}/train/{name}/"},
    }
    assert np.array_equal(small.split("train").array(name)[:], want)
    assert np.array_equal(zarr.open_group(small.store, mode="r")[f"train/{name}"][:], want)
    assert np.array_equal(
        xr.open_zarr(small.store, group="train", mask_and_scale=False)[name].values, want
    )
    assert np.array_equal(tensorstore.open(spec, open=True).result().read().result(), want)


def test_xarray_opens_it_silently_with_names_and_pictures_in_0_1(small: Warehouse) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = xr.open_zarr(small.store, group="train")
        tree = xr.open_datatree(str(small.store))
    assert split.image.dims == ("sample", "channel", "y", "x")
    assert split.box.dims == ("sample", "slot", "corner")
    assert split.image.dtype.kind == "f"
    assert float(split.image.max()) == pytest.approx(1.0)
    assert set(tree.children) == {"train", "val"}
    assert split.attrs["class_names"] == ["a", "b"]


def test_the_xarray_view_is_float32_in_stored_chunks(small: Warehouse) -> None:
    view = small.split("train").xarray()
    assert view.image.dtype == np.float32
    assert view.image.chunks[0] == (8, 8, 8, 5)
    assert np.allclose(view.image.values, expected("image", "train", 29) / 255)


@pytest.mark.parametrize("path", ["root", "version", "manifest"])
def test_a_warehouse_opens_from_root_version_or_manifest(small: Warehouse, path: str) -> None:
    where = {
        "root": small.folder.parent,
        "version": small.folder,
        "manifest": small.folder / "manifest.json",
    }[path]
    assert Warehouse.open(str(where)).version == small.version


def test_a_split_travels_by_path(small: Warehouse) -> None:
    split = pickle.loads(pickle.dumps(small.split("val")))
    assert (len(split), split.chunk_sizes, split.class_names) == (9, [8, 1], ["a", "b"])


def test_unknown_names_are_typed_errors(small: Warehouse) -> None:
    with pytest.raises(StoreError, match="train, val"):
        small.split("dev")
    with pytest.raises(StoreError, match="box_mask"):
        small.split("val").array("boxes")


def test_no_warehouse_is_an_error_that_names_the_build(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotAWarehouseError, match=r"scripts\.build_zarr"):
            Warehouse.open(path)


@pytest.mark.parametrize("content", ["", "../../etc", "v123", "v" + "0" * 12, "v\0"], ids=repr)
def test_a_strange_current_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "CURRENT").write_text(content)
    with pytest.raises(WarehouseError, match="CURRENT"):
        Warehouse.open(tmp_path)


@pytest.mark.filterwarnings("ignore:batch_size")
@pytest.mark.parametrize(
    "layout",
    [
        {"compressor": "none"},
        {"compressor": "lz4hc"},
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"shard_samples": 1},
    ],
    ids=str,
)
def test_every_layout_reads_back_through_both_paths(
    tmp_path: Path, layout: dict[str, object]
) -> None:
    chosen = BuildSettings(**(SMALL.model_dump() | layout))
    split = build(tmp_path, {"train": 11}, chosen).split("train")
    want = np.stack([sample(number, chosen)["image"] for number in numbers("train", 11)])
    assert np.array_equal(split.array("image")[:], want)
    with ChunkLoader(split, 4, engine="inline", shuffle=False) as loader:
        assert np.array_equal(np.concatenate([batch["image"].numpy() for batch in loader]), want)


@given(
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(8, 20),
    st.integers(8, 20),
    st.sampled_from(["lz4", "none"]),
    st.sampled_from(["uint8", "float32"]),
)
@settings(max_examples=15, deadline=None)
def test_our_decoder_and_zarr_agree_for_drawn_shapes(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    shard: int,
    height: int,
    width: int,
    codec: str,
    dtype: str,
) -> None:
    chosen = BuildSettings(
        target_size=(height, width), max_boxes=2, shard_samples=shard, compressor=codec, dtype=dtype
    )
    split = build(tmp_path_factory.mktemp("drawn"), {"train": count}, chosen).split("train")
    reader = split.reader()
    for name in split.arrays:
        want = split.array(name)[:]
        spec = split.specs[name]
        for chunk, size in enumerate(split.chunk_sizes):
            part = want[chunk * shard : chunk * shard + size]
            if spec.inner is None:
                assert np.array_equal(reader.small(name, chunk), part)
            else:
                out = np.empty((size, *spec.shape[1:]), spec.dtype)
                reader.read_rows(name, chunk, np.arange(size), out, np.arange(size))
                assert np.array_equal(out, part)


def damaged(small: Warehouse, tmp_path: Path) -> Path:
    root = tmp_path / "copy"
    shutil.copytree(small.folder.parent, root)
    return root / small.version


def read_everything(version: Path, access: str = "mmap") -> None:
    warehouse = Warehouse.open(version)
    for name in warehouse.splits:
        with ChunkLoader(warehouse.split(name), 4, engine="thread", store=access) as loader:
            for _ in loader:
                pass


IMAGE, BOX = "warehouse.zarr/train/image/c/1/0/0/0", "warehouse.zarr/train/box/c/1/0/0"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("file", [IMAGE, BOX])
@pytest.mark.parametrize("place", [0.0, 0.1, 0.37, 0.5, 0.73, 0.99, 1.0])
def test_one_flipped_bit_is_an_error_naming_the_file(
    small: Warehouse, tmp_path: Path, file: str, place: float, access: str
) -> None:
    version = damaged(small, tmp_path)
    size = (version / file).stat().st_size
    flip(version / file, min(size - 1, int(place * size)))
    with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
        read_everything(version, access)
    _, faults = verify(Warehouse.open(version))
    assert [fault.path for fault in faults] == [file]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_link(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, append, Path.unlink, make_folder, make_fifo, make_link],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("file", [IMAGE, BOX])
def test_a_file_cut_grown_gone_or_replaced_is_an_error_naming_it(
    small: Warehouse, tmp_path: Path, file: str, damage: object
) -> None:
    version = damaged(small, tmp_path)
    damage(version / file)  # type: ignore[operator]
    with pytest.raises(CorruptError, match=file.replace(".", r"\.")):
        read_everything(version)
    _, faults = verify(Warehouse.open(version), "quick")
    assert file in {fault.path for fault in faults}


@pytest.mark.parametrize("file", [IMAGE, BOX])
def test_two_swapped_files_are_noticed(small: Warehouse, tmp_path: Path, file: str) -> None:
    version = damaged(small, tmp_path)
    one, two = version / file, version / file.replace("c/1", "c/0")
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(CorruptError, match=r"warehouse\.zarr/train"):
        read_everything(version)
    assert len(verify(Warehouse.open(version))[1]) == 2


def test_a_swapped_file_of_the_same_size_is_noticed_by_its_seal(tmp_path: Path) -> None:
    version = build(
        tmp_path, {"train": 16}, BuildSettings(**(SMALL.model_dump() | {"compressor": "none"}))
    ).folder
    one, two = (version / f"warehouse.zarr/train/image/c/{chunk}/0/0/0" for chunk in (0, 1))
    assert one.stat().st_size == two.stat().st_size
    shutil.copy(two, one)
    with pytest.raises(CorruptError, match="not the one that was published"):
        read_everything(version)


def test_an_inner_chunk_moved_inside_its_file_is_noticed(tmp_path: Path) -> None:
    """Index entries exchanged and the index's crc32c made right again: only the seal can tell."""
    import struct

    from crc32c import crc32c

    version = build(tmp_path, {"train": 8}).folder
    path = version / "warehouse.zarr/train/image/c/0/0/0/0"
    data = bytearray(path.read_bytes())
    start = len(data) - 8 * 16 - 4
    data[start : start + 16], data[start + 16 : start + 32] = (
        data[start + 16 : start + 32],
        data[start : start + 16],
    )
    data[-4:] = struct.pack("<I", crc32c(bytes(data[start:-4])))
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="not the one that was published"):
        read_everything(version)


@pytest.mark.parametrize(
    "file",
    [
        "manifest.json",
        "files.parquet",
        "samples.parquet",
        "rejected.jsonl",
        "warehouse.zarr/train/image/zarr.json",
        "warehouse.zarr/zarr.json",
    ],
)
def test_a_version_edited_by_hand_is_reported(small: Warehouse, tmp_path: Path, file: str) -> None:
    version = damaged(small, tmp_path)
    path = version / file
    path.write_bytes(path.read_bytes().replace(b'"train"', b'"trian"') + b" ")
    if file == "manifest.json":
        with pytest.raises(CorruptError, match=r"manifest\.json"):
            Warehouse.open(version)
    else:
        faults = verify(Warehouse.open(version))[1]
        assert any(file in f"{fault.path} {fault.detail}" for fault in faults)


def test_a_version_folder_that_holds_another_version_is_refused(tmp_path: Path) -> None:
    first, second = build(tmp_path), build(tmp_path, note="another recipe")
    first.folder.rename(tmp_path / "aside")
    second.folder.rename(first.folder)
    with pytest.raises(CorruptError, match="another version"):
        Warehouse.open(first.folder)


def test_a_float16_store_is_viewed_as_float32(tmp_path: Path) -> None:
    chosen = BuildSettings(**(SMALL.model_dump() | {"dtype": "float16"}))
    assert build(tmp_path, {"train": 3}, chosen).split("train").xarray().image.dtype == np.float32


def test_a_foreign_file_in_a_version_is_reported(small: Warehouse, tmp_path: Path) -> None:
    version = damaged(small, tmp_path)
    (version / "warehouse.zarr/train/extra").write_text("x")
    assert [fault.path for fault in verify(Warehouse.open(version))[1]] == [
        "warehouse.zarr/train/extra"
    ]


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b'{"manifest_sha256": 3}', b"\xff\xfe", b"[" * 5000]
)
def test_any_bytes_as_manifest_are_a_typed_error(
    small: Warehouse, tmp_path: Path, text: bytes
) -> None:
    version = damaged(small, tmp_path)
    (version / "manifest.json").write_bytes(text)
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        Warehouse.open(version)


def test_verify_finds_nothing_on_a_fresh_version(small: Warehouse) -> None:
    files, faults = verify(small)
    assert faults == []
    assert files == sum(1 for path in small.store.rglob("*") if path.is_file())


def test_every_stored_chunk_is_a_file_and_every_sample_is_in_it(tmp_path: Path) -> None:
    """All-zero samples too: by default zarr leaves them out, which looks like loss."""
    version = build(tmp_path, {"train": 9})
    assert sorted(path.name for path in (version.store / "train/box/c").iterdir()) == ["0", "1"]
    assert (version.store / "train/box_flags/c/1/0").is_file()
