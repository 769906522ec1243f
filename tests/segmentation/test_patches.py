"""Patches: where they lie, how they are cut, what the manifest says, what bad pictures get."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ingest.pictures.large.patch_cutter import PatchCutter, cut_versions
from ingest.pictures.large.survey import list_pictures, survey
from ingest.pictures.large.windows import open_windows, read_window_header
from segmentation.cutting import write_patch_manifest
from segmentation.patches import (
    patch_boxes,
    patch_offsets,
    patch_recipe,
    plan_patches,
)
from segmentation.settings import SegmentSettings
from warehouse import Warehouse
from warehouse.errors import BuildError, ConfigError, PictureError, ThresholdError
from warehouse.inspect.verify import verify
from warehouse.settings import BuildSettings
from warehouse.write.publish import bake, open_root

SIZE, OVERLAP, JOB = 32, 8, 4


def draw(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    seed: int = 0,
    *,
    mask: bool = True,
    values: tuple[int, int] = (0, 255),
) -> None:
    rng = np.random.default_rng(seed)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / "images" / name)
    if mask:
        label = rng.random(shape[:2]) < 0.3
        Image.fromarray(np.where(label, values[1], values[0]).astype(np.uint8)).save(
            folder / "masks" / (name.rpartition(".")[0] + ".png")
        )


def settings_for(root: Path, **more: Any) -> BuildSettings:
    return BuildSettings(
        input_root=str(root),
        format="masks",
        splits={"train": 0.5, "val": 0.25, "test": 0.25},
        group_pattern=None,
        output_root=str(root / "out"),
        **more,
    )


def cut(
    root: Path,
    output: Path,
    *,
    size: int = SIZE,
    channels: int | None = None,
    limit: int | None = None,
    **more: Any,
) -> Any:
    """(version, cutter), through the same calls as the command. limit.

    Fail as a killed process would after so many patches.
    """
    build = settings_for(root, **more)
    listing = list_pictures(build)
    shared = ("mask_values", "splits", "group_pattern", "seed", "max_pixels")
    settings = SegmentSettings(
        patch_size=size,
        overlap=OVERLAP,
        job_size=JOB,
        channels=channels,
        levels=1,
        stem=1,
        **{key: getattr(build, key) for key in shared},
    )
    recipe = patch_recipe(listing.fingerprint, settings, cut_versions())
    cutters: list[PatchCutter] = []

    def make_plan(unreadable: Any) -> Any:
        found = survey(listing, build, least=size, unreadable=unreadable)
        return plan_patches(
            found.parents,
            recipe,
            channels=channels or (1 if found.grey else 3),
            found=found.found,
            rejected=found.rejected,
            warnings=found.warnings,
        )

    def load_for(plan: Any) -> Any:
        cutters.append(
            PatchCutter(
                listing.root, plan.splits[0].specs[0].shape[1], build.mask_values, build.max_pixels
            )
        )
        if limit is None:
            return cutters[-1]
        left = iter(range(limit))

        def load(payload: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return cutters[-1](payload)

        return load

    open_root(output)
    manifest = bake(
        make_plan, load_for, output, workers=0, cluster=None, trace=False, on_plan=lambda _: None
    )
    return Warehouse.open(output / manifest.version), cutters[-1] if cutters else None


@given(st.integers(1, 400), st.integers(1, 64), st.data())
def test_patches_cover_a_side_without_leaving_it_and_only_the_last_is_moved(
    length: int, size: int, data: Any
) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    if size > length:
        with pytest.raises(ConfigError, match="larger than the image"):
            patch_offsets(length, size, overlap)
        return
    offsets = patch_offsets(length, size, overlap)
    seen = np.zeros(length, int)
    for offset in offsets:
        assert 0 <= offset <= length - size
        seen[offset : offset + size] += 1
    assert seen.min() >= 1
    assert offsets[:-1] == [at * (size - overlap) for at in range(len(offsets) - 1)]
    assert all(after - before <= size - overlap for before, after in pairwise(offsets))


@pytest.mark.parametrize("overlap", [32, 40, -1])
def test_patches_that_do_not_advance_are_refused(overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"segment\.overlap"):
        patch_offsets(100, 32, overlap)


def test_the_grid_of_a_512_picture_ends_with_patches_shifted_inward() -> None:
    assert patch_offsets(512, 256, 64) == [0, 192, 256]
    assert [box for _, _, box in patch_boxes(300, 256, 256, 64)] == [
        (0, 0, 256, 256),
        (44, 0, 300, 256),
    ]


def test_every_patch_is_the_part_of_its_parent_that_the_manifest_says(tmp_path: Path) -> None:
    shapes = {"a.png": (70, 90), "b.png": (32, 33), "c.jpg": (64, 40), "d.png": (41, 58)}
    for at, (name, shape) in enumerate(shapes.items()):
        draw(tmp_path / "in", name, shape, at)
    draw(tmp_path / "in", "free.png", (50, 50), 9, mask=False)
    warehouse, _ = cut(tmp_path / "in", tmp_path / "store")
    manifest = write_patch_manifest(warehouse, tmp_path)
    rows = pq.read_table(manifest).to_pylist()
    assert {row["parent"] for row in rows} == {f"images/{name}" for name in (*shapes, "free.png")}
    assert len({row["patch_id"] for row in rows}) == len(rows)
    by_parent: dict[str, set[str]] = {}
    for row in rows:
        by_parent.setdefault(row["parent"], set()).add(row["split"])
        picture = np.asarray(Image.open(tmp_path / "in" / row["parent"]))
        box = np.s_[row["y1"] : row["y2"], row["x1"] : row["x2"]]
        split = warehouse.split(row["split"])
        image, mask = split.array("image")[row["index"]], split.array("mask")[row["index"]]
        np.testing.assert_array_equal(image[0], picture[box])
        assert (row["x2"] - row["x1"], row["y2"] - row["y1"]) == (SIZE, SIZE)
        assert row["shift_x"] == row["column"] * (SIZE - OVERLAP) - row["offset_x"]
        assert (tmp_path / "store" / row["features_path"]).is_file()
        assert row["index"] == int(row["features_path"].split("/")[-4]) * JOB + row["slot"]
        stem = Path(row["parent"]).stem
        if row["parent"].endswith("free.png"):
            assert (mask == 255).all()
        else:
            np.testing.assert_array_equal(
                mask, np.asarray(Image.open(tmp_path / "in" / "masks" / f"{stem}.png"))[box] // 255
            )
    assert all(len(splits) == 1 for splits in by_parent.values()), "a parent lies in one split"
    assert by_parent["images/free.png"] == {"predict"}
    assert verify(warehouse)[1] == []
    with manifest.with_suffix(".csv").open() as file:
        told = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == told


def test_a_parent_is_decoded_once_for_all_its_patches(tmp_path: Path) -> None:
    for at in range(4):
        draw(tmp_path / "in", f"{at}.png", (80, 100), at)
    warehouse, _ = cut(tmp_path / "in", tmp_path / "first")
    (tmp_path / "store").mkdir()
    (
        tmp_path / "store" / f".staging-{warehouse.version}"
    ).mkdir()  # resumed: space is not estimated again
    again, cutter = cut(tmp_path / "in", tmp_path / "store")
    assert cutter.decoded == 4
    assert again.manifest.digest == warehouse.manifest.digest


def test_cutting_that_was_stopped_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    for at in range(4):
        draw(tmp_path / "in", f"{at}.png", (80, 100), at)
    whole, _ = cut(tmp_path / "in", tmp_path / "whole")
    for limit in (13, 6):  # the first 8 go into estimating the space
        with pytest.raises(KeyboardInterrupt):
            cut(tmp_path / "in", tmp_path / "halves", limit=limit)
    resumed, _ = cut(tmp_path / "in", tmp_path / "halves")
    assert resumed.manifest.digest == whole.manifest.digest
    assert resumed.manifest.tables == whole.manifest.tables


def test_a_manifest_is_never_overwritten(tmp_path: Path) -> None:
    draw(tmp_path / "in", "a.png", (70, 90))
    warehouse, _ = cut(tmp_path / "in", tmp_path / "store")
    first = write_patch_manifest(warehouse, tmp_path)
    before = first.read_bytes()
    assert write_patch_manifest(warehouse, tmp_path) == first
    other, _ = cut(tmp_path / "in", tmp_path / "store", size=40)
    second = write_patch_manifest(other, tmp_path)
    assert (first.name, second.name) == (
        "patch_manifest.v001.parquet",
        "patch_manifest.v002.parquet",
    )
    assert first.read_bytes() == before


def bad_mask_size(root: Path) -> None:
    Image.fromarray(np.zeros((70, 80), np.uint8)).save(root / "masks" / "a.png")


def bad_mask_values(root: Path) -> None:
    Image.fromarray(np.full((70, 90), 7, np.uint8)).save(root / "masks" / "a.png")


def torn_picture(root: Path) -> None:
    path = root / "images" / "a.png"
    path.write_bytes(path.read_bytes()[:2000])


def no_picture(root: Path) -> None:
    (root / "images" / "a.png").write_bytes(b"not a picture")


def small_picture(root: Path) -> None:
    draw(root, "a.png", (31, 90))


def torn_mask(root: Path) -> None:
    path = root / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:300])


BAD = {
    bad_mask_size: "mask_size",
    bad_mask_values: "mask_values",
    torn_picture: "truncated",
    no_picture: "unreadable",
    small_picture: "smaller_than_patch",
    torn_mask: "mask_unreadable",
}


REMEDY = {
    "mask_values": "--segment.mask_values",
    "smaller_than_patch": "lower --segment.patch_size",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_picture_is_a_typed_error_and_a_rejected_line_where_it_may_be_left_out(
    tmp_path: Path, spoil: Any
) -> None:
    for at, name in enumerate(("a.png", "b.png", "c.png")):
        draw(tmp_path / "in", name, (70, 90), at)
    spoil(tmp_path / "in")
    with pytest.raises(ThresholdError, match=BAD[spoil]) as caught:
        cut(tmp_path / "in", tmp_path / "store")
    assert "images/a.png" in str(caught.value)
    assert "--segment.max_invalid 1" in str(caught.value)
    assert REMEDY.get(BAD[spoil], "mend or remove") in str(caught.value)
    warehouse, _ = cut(tmp_path / "in", tmp_path / "store", max_invalid=1)
    lines = (warehouse.folder / "rejected.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert '"images/a.png"' in lines[0]
    assert f'"{BAD[spoil]}"' in lines[0]
    assert "images/a.png" not in warehouse.table("samples.parquet")["source"].to_pylist()


def test_masks_of_0_and_255_declared_as_0_and_1_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "in", "a.png", (70, 90))
    with pytest.raises(
        ThresholdError, match=r"mask_values: expected values \[0, 1\].*found \[255\]"
    ):
        cut(tmp_path / "in", tmp_path / "store", mask_values={0: 0, 1: 1})


def test_colour_pictures_become_luma_where_one_channel_is_asked_for(tmp_path: Path) -> None:
    draw(tmp_path / "in", "a.png", (40, 40, 3))
    picture = np.asarray(Image.open(tmp_path / "in" / "images" / "a.png")).astype(np.float64)
    warehouse, _ = cut(tmp_path / "in", tmp_path / "store", channels=1)
    found = warehouse.split(warehouse.splits[0]).array("image")[0, 0].astype(float)
    assert np.abs(found - (picture @ [0.299, 0.587, 0.114])[:32, :32]).max() <= 0.51
    colour, _ = cut(tmp_path / "in", tmp_path / "store")
    np.testing.assert_array_equal(
        colour.split(colour.splits[0]).array("image")[0], picture[:32, :32].transpose(2, 0, 1)
    )


def write_tiff(path: Path, pixels: Any, **more: Any) -> None:
    import warnings

    import rasterio

    bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            width=bands.shape[2],
            height=bands.shape[1],
            count=len(bands),
            dtype=bands.dtype,
            **more,
        ) as file:
            file.write(bands)


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((80, 100), "uint8", {"tiled": True, "blockxsize": 16, "blockysize": 16}),
        ((80, 100, 3), "uint8", {"photometric": "RGB", "compress": "deflate"}),
        ((80, 100), "uint16", {"compress": "lzw"}),
    ],
    ids=["tiles", "strips in colour", "16 bits"],
)
def test_a_tiff_read_by_window_shows_what_the_whole_picture_decoder_shows(
    tmp_path: Path, shape: Any, dtype: str, options: Any
) -> None:
    from ingest.pictures.images import decode_rgb

    pixels = np.random.default_rng(1).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    write_tiff(tmp_path / "a.tif", pixels, **options)
    known = read_window_header(tmp_path, "a.tif", max_pixels=10)
    assert known.by_window
    assert (known.width, known.height, known.grey) == (100, 80, len(shape) == 2)
    windows = open_windows(tmp_path, "a.tif", known, sha256="", max_pixels=10)
    whole, _ = decode_rgb((tmp_path / "a.tif").read_bytes(), name="a.tif", max_pixels=10_000)
    part = windows.read((33, 5, 65, 71))
    windows.close()
    np.testing.assert_array_equal(
        part, whole[5:71, 33:65, 0] if part.ndim == 2 else whole[5:71, 33:65]
    )


@pytest.mark.parametrize(
    ("value", "dtype", "reason"), [(7, "uint8", "mask_values"), (255, "uint16", "mask_unreadable")]
)
def test_a_mask_read_by_window_is_refused_for_its_last_pixel(
    tmp_path: Path, value: int, dtype: str, reason: str
) -> None:
    for name in ("images", "masks"):
        (tmp_path / "in" / name).mkdir(parents=True)
    write_tiff(
        tmp_path / "in/images/a.tif",
        np.random.default_rng(0).integers(0, 256, (70, 90), np.uint8),
        tiled=True,
        blockxsize=16,
        blockysize=16,
    )
    mask = np.zeros((70, 90), dtype)
    mask[-1, -1] = value
    write_tiff(tmp_path / "in/masks/a.tif", mask)
    with pytest.raises(ThresholdError, match=rf"images/a\.tif \({reason}"):
        cut(tmp_path / "in", tmp_path / "store")


def test_a_palette_tiff_is_decoded_whole_within_its_limit(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)).convert(
        "P"
    )
    image.save(tmp_path / "a.tif")
    assert not read_window_header(tmp_path, "a.tif", max_pixels=2000).by_window
    with pytest.raises(PictureError, match="too_large"):
        read_window_header(tmp_path, "a.tif", max_pixels=1999)


def test_a_truncated_tiff_is_refused_where_it_is_read(tmp_path: Path) -> None:
    write_tiff(
        tmp_path / "a.tif",
        np.random.default_rng(1).integers(0, 256, (200, 200), np.uint8),
        tiled=True,
        blockxsize=32,
        blockysize=32,
    )
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[: len(data) // 2])
    known = read_window_header(tmp_path, "a.tif", max_pixels=100_000)
    with pytest.raises(PictureError, match=r"unreadable|truncated"):
        open_windows(tmp_path, "a.tif", known, sha256="", max_pixels=100_000).read(
            (0, 150, 200, 200)
        )


def test_an_output_that_cannot_be_written_is_a_build_error(tmp_path: Path) -> None:
    draw(tmp_path / "in", "a.png", (70, 90))
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="is a file"):
        cut(tmp_path / "in", tmp_path / "file")
