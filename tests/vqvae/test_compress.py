"""A cube as codes and back.

The whole cube, its holes, its splits, the bytes on disk (rates and errors:
tests/vqvae/test_rate.py).
"""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from cube_fakes import SERIES, build_cube, write_series

from scripts import compress_zarr
from scripts._command import run
from utils.loader import ChunkLoader
from utils.training.checkpoint import prefixed, save_checkpoint
from vqvae.compress.blocks import encode_blocks, learned_search, training_vectors
from vqvae.compress.codec import restore_vqvae
from vqvae.compress.decode import CodesOfCube, decode_blocks
from vqvae.compress.encode import plan_codes
from vqvae.compress.reconstruct import reconstruct
from vqvae.network.model import VQVAE, Shape
from vqvae.rate.distortion import packed_bytes
from vqvae.settings import CompressSettings
from warehouse import Warehouse
from warehouse.errors import BuildError, ConfigError, StateError, StoreError, TrainingError
from warehouse.format.schema import ArraySpec
from warehouse.inspect.report import write_contact_sheet
from warehouse.inspect.summary import export
from warehouse.inspect.verify import verify
from warehouse.settings import BuildSettings, InspectSettings
from warehouse.write.publish import bake, open_root

GUARDED = {**SERIES, "guard": 1, "block": {"y": 24, "x": 24}}


def checkpoint(
    folder: Path, features: Any, *, block: tuple[int, int, int] = (3, 8, 8), seed: int = 0
) -> str:
    """An untrained model with a fixed grid of codes.

    It uses many of them, and says something else for every seed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VQVAE(
            features,
            Shape(
                block,
                (3, 4, 4),
                (3, 4, 4),
                width=8,
                depth=1,
                quantizer="fsq",
                codebook_size=512,
                levels=2,
            ),
        )
    save_checkpoint(folder, prefixed("average", model.state_dict()), {"model": model.describe()})
    return str(folder)


def compressed(cube: Warehouse, model: str, root: Path, **options: Any) -> Warehouse:
    plan, load = plan_codes(
        cube,
        CompressSettings(
            checkpoint=model, output_root=str(root), **{"shard_samples": 16, **options}
        ),
    )
    open_root(root)
    bake(
        lambda _: plan,
        lambda _: load,
        root,
        workers=0,
        cluster=None,
        trace=True,
        on_plan=lambda _: None,
    )
    return Warehouse.open(root)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Warehouse, str, Warehouse]:
    """(cube with blocks in no split, checkpoint, its codes)."""
    folder = tmp_path_factory.mktemp("codes")
    cube = build_cube(write_series(folder / "raw"), folder / "cube", GUARDED)
    assert cube.cube is not None
    model = checkpoint(folder / "model", cube.cube.features)
    return cube, model, compressed(cube, model, folder / "codes")


def whole(cube: Warehouse) -> np.ndarray:
    return zarr.open_array(cube.folder / "warehouse.zarr", path="cube/data", mode="r")[:]


def test_codes_open_in_the_loader_with_the_cube_s_splits(
    made: tuple[Warehouse, str, Warehouse],
) -> None:
    cube, model, codes = made
    codec, settings = restore_vqvae(model), codes.manifest.recipe["settings"]
    assert set(cube.splits) < set(codes.splits)
    for name in cube.splits:
        mine, other = codes.split(name), cube.split(name)
        assert len(mine) == len(other)
        assert mine.class_names == []
        seen = {}
        with (
            ChunkLoader(mine, 2, engine="inline") as batches,
            ChunkLoader(other, 2, shuffle=False, engine="inline") as blocks,
        ):
            for batch in batches:
                assert batch["codes"].dtype == torch.uint16
                seen |= {
                    int(at): {key: value[i].clone() for key, value in batch.items()}
                    for i, at in enumerate(batch["index"])
                }
            for batch in blocks:
                search = learned_search(
                    codec,
                    training_vectors(codec, cube),
                    levels=2,
                    weight=settings["rate_weight"],
                    paths=settings["paths"],
                )
                expected = search.order, codec.encode(batch["data"], batch["valid"], search)
                for i, at in enumerate(batch["index"].tolist()):
                    rows = [
                        order[seen[at]["codes"][level].long()]
                        for level, order in enumerate(expected[0])
                    ]
                    assert torch.equal(torch.stack(rows), expected[1][i])
                    assert seen[at]["origin"].tolist() == other.origins(np.array([at]))[0].tolist()
                    bits = np.unpackbits(seen[at]["valid"].numpy(), count=batch["valid"][i].numel())
                    assert np.array_equal(bits, batch["valid"][i].numpy().reshape(-1))


def test_any_stored_chunk_of_codes_is_one_zarr_chunk_that_zarr_python_reads(
    made: tuple[Warehouse, str, Warehouse],
) -> None:
    _, _, codes = made
    split = codes.split("train")
    array = zarr.open_array(codes.folder / "warehouse.zarr", path="train/codes", mode="r")
    assert array.shards is None
    assert array.chunks[0] == 16
    assert np.array_equal(array[:16], split.reader(access="pread").small("codes", 0))


def test_the_whole_cube_comes_back_lazily_and_as_a_version_with_its_holes(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path
) -> None:
    cube, model, codes = made
    lazy = reconstruct(codes.folder, model)
    assert lazy["data"].dims == ("time", "y", "x", "feature")
    assert lazy["data"].data.chunksize[:3] == cube.cube.layout.shard
    back, truth = lazy["data"].values, whole(cube)
    assert np.array_equal(np.isnan(back), np.isnan(truth))
    codec, split = restore_vqvae(model), cube.split("test")
    reader, out = (
        split.reader(),
        {name: np.empty((1, *spec.shape[1:]), spec.dtype) for name, spec in split.specs.items()},
    )
    reader.fill(list(out), np.array([3]), out)
    t, y, x = split.origins(np.array([3]))[0]
    expected = codec.decode(
        codec.encode(torch.from_numpy(out["data"]), torch.from_numpy(out["valid"]))
    )[0].numpy()
    found = back[t : t + 3, y : y + 8, x : x + 8]
    np.testing.assert_allclose(
        found[out["valid"][0]], expected[out["valid"][0]], rtol=1e-4, atol=1e-4
    )
    argv = [
        "--compress.warehouse",
        str(cube.folder),
        "--compress.checkpoint",
        model,
        "--compress.output_root",
        str(codes.folder.parent),
        "--compress.shard_samples",
        "16",
        "--compress.reconstruct",
        str(tmp_path / "again"),
    ]
    assert run(compress_zarr.main, compress_zarr.Settings, None, argv) == 0
    again = Warehouse.open(tmp_path / "again")
    np.testing.assert_allclose(whole(again), back, rtol=1e-4, atol=1e-4)
    assert verify(again)[1] == []
    assert again.cube.layout == cube.cube.layout
    assert np.array_equal(again.cube_table("split"), cube.cube_table("split"))
    red, values = again.cube.features[0], whole(again)[..., 0]
    assert (
        values[~np.isnan(values)].min() - 1e-3
        <= red.minimum
        <= red.maximum
        <= values[~np.isnan(values)].max() + 1e-3
    )


def test_codes_are_the_same_for_any_stored_chunk_size_and_a_flipped_byte_is_found(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path
) -> None:
    cube, model, codes = made
    other = compressed(cube, model, tmp_path / "other", shard_samples=7)
    assert other.manifest.digest == codes.manifest.digest
    assert verify(other)[1] == []
    path = next((other.folder / "warehouse.zarr" / "train" / "codes" / "c").rglob("0"))
    path = path if path.is_file() else next(part for part in path.rglob("*") if part.is_file())
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert verify(other)[1]


def test_fewer_levels_are_a_prefix(made: tuple[Warehouse, str, Warehouse], tmp_path: Path) -> None:
    cube, model, _ = made
    nearest = {"rate_weight": 0, "paths": 1}
    codes, one = (
        compressed(cube, model, tmp_path / str(levels), levels=levels, **nearest)
        for levels in (2, 1)
    )
    assert np.array_equal(
        one.split("train").array("codes")[:], codes.split("train").array("codes")[:, :1]
    )
    both = CodesOfCube(codes.folder, model, levels=1).decoded(0)[1]
    assert np.array_equal(both, CodesOfCube(one.folder, model).decoded(0)[1], equal_nan=True)


def test_chunks_numbered_by_another_search_are_made_again(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path
) -> None:
    cube, model, codes = made
    settings = CompressSettings(checkpoint=model, output_root=str(tmp_path), shard_samples=16)
    plan, load = plan_codes(cube, settings)
    # What a rounding on another machine does: two codes of equal use change places.
    other = load.search.order.clone()
    other[:, [0, 1]] = other[:, [1, 0]]
    changed = replace(load, search=replace(load.search, order=other))
    first = replace(
        plan,
        splits=tuple(
            replace(split, digests=(changed.search.digest,) * len(split.digests))
            for split in plan.splits
        ),
    )
    open_root(tmp_path)
    calls = iter(range(3))

    def killed(payload: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return changed(payload)

    with pytest.raises(KeyboardInterrupt):
        bake(
            lambda _: first,
            lambda _: killed,
            tmp_path,
            workers=0,
            cluster=None,
            trace=True,
            on_plan=lambda _: None,
        )
    bake(
        lambda _: plan,
        lambda _: load,
        tmp_path,
        workers=0,
        cluster=None,
        trace=True,
        on_plan=lambda _: None,
    )
    assert Warehouse.open(tmp_path).manifest.digest == codes.manifest.digest
    for chunk in range(2):
        one, two = (
            CodesOfCube(version.folder, model).decoded(chunk)[1]
            for version in (Warehouse.open(tmp_path), codes)
        )
        assert np.array_equal(one, two, equal_nan=True)


def test_codes_of_an_earlier_release_and_unknown_devices_are_refused(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path
) -> None:
    cube, model, _ = made
    plan, load = plan_codes(cube, CompressSettings(checkpoint=model, shard_samples=16))
    old = replace(
        plan, summary={key: value for key, value in plan.summary.items() if key != "codebook_rows"}
    )
    open_root(tmp_path)
    bake(
        lambda _: old,
        lambda _: load,
        tmp_path,
        workers=0,
        cluster=None,
        trace=True,
        on_plan=lambda _: None,
    )
    with pytest.raises(
        StoreError, match=r"do not say how they are numbered.*earlier release.*compress_zarr"
    ):
        CodesOfCube(Warehouse.open(tmp_path).folder, model)
    with pytest.raises(ConfigError, match="the device cannot be used"):
        plan_codes(cube, CompressSettings(checkpoint=model, device="nonesuch"))


def test_refusals_name_what_is_wrong(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path
) -> None:
    cube, model, codes = made
    features = cube.cube.features
    stranger = checkpoint(tmp_path / "stranger", features, seed=1)
    with pytest.raises(StateError, match="another checkpoint"):
        reconstruct(codes.folder, stranger)
    with pytest.raises(StateError, match="other features"):
        plan_codes(cube, CompressSettings(checkpoint=checkpoint(tmp_path / "fewer", features[:3])))
    with pytest.raises(StateError, match="other blocks"):
        plan_codes(
            cube,
            CompressSettings(checkpoint=checkpoint(tmp_path / "wide", features, block=(3, 16, 16))),
        )
    with pytest.raises(StateError, match="fewer levels"):
        plan_codes(cube, CompressSettings(checkpoint=model, levels=3))
    with pytest.raises(TrainingError, match="holds no cube"):
        plan_codes(codes, CompressSettings(checkpoint=model))
    with pytest.raises(ConfigError, match="no checkpoint"):
        plan_codes(cube, CompressSettings(checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(StoreError, match="holds no codes"):
        reconstruct(cube.folder, model)
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="is a file"):
        compress_zarr.main(_settings(cube, model, output_root=str(tmp_path / "file")))


def _settings(cube: Warehouse, model: str, **options: Any) -> compress_zarr.Settings:
    return compress_zarr.Settings(
        compress=CompressSettings(warehouse=str(cube.folder), checkpoint=model, **options),
        build=BuildSettings(),
    )


def test_a_model_of_windows_codes_whole_inner_chunks_tile_by_tile(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path
) -> None:
    cube, _, _ = made
    codec = restore_vqvae(checkpoint(tmp_path / "window", cube.cube.features, block=(3, 4, 8)))
    data = np.random.default_rng(0).uniform(1, 200, (2, 3, 8, 8, 6)).astype(np.float32)
    valid = np.ones(data.shape, bool)
    codes = encode_blocks(codec, data, valid)
    assert codes.shape == (2, 2, 1, 2, 2)
    lower = codec.encode(torch.from_numpy(data[:, :, 4:]), torch.from_numpy(valid[:, :, 4:]))
    assert np.array_equal(codes[:, :, :, 1:], lower.numpy())
    assert np.allclose(
        decode_blocks(codec, codes, (3, 8, 8))[:, :, 4:], codec.decode(lower).numpy(), atol=1e-4
    )


def test_memory_does_not_grow_with_the_cube(tmp_path: Path) -> None:
    peaks = []
    for size in ((48, 48), (96, 192)):
        cube = build_cube(
            write_series(tmp_path / f"raw{size[0]}", size=size), tmp_path / f"cube{size[0]}"
        )
        model = checkpoint(tmp_path / f"model{size[0]}", cube.cube.features)
        _, load = plan_codes(cube, CompressSettings(checkpoint=model, shard_samples=16))
        list(load((0, 0)).samples)
        tracemalloc.start()
        plan, load = plan_codes(cube, CompressSettings(checkpoint=model, shard_samples=16))
        for payload in plan.splits[0].payloads:
            for _ in load(payload).samples:
                pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], "eight times the voxels"


def test_packed_bytes_are_those_on_disk(made: tuple[Warehouse, str, Warehouse]) -> None:
    _, _, codes = made
    split = codes.split("train")
    files = codes.files("train/codes")[0]
    raw = codes.manifest.arrays["codes"]
    spec = ArraySpec(
        "codes",
        (len(split), *raw.row),
        raw.dtype,
        raw.dims,
        (16, *raw.row),
        None,
        raw.codec,
    )
    assert packed_bytes(split.array("codes")[:], spec) == int(files.sum())


def test_the_command_reports_rates_beside_other_codecs(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cube, model, _ = made
    argv = [
        "--compress.warehouse",
        str(cube.folder),
        "--compress.checkpoint",
        model,
        "--compress.output_root",
        str(tmp_path / "codes"),
        "--compress.report",
        str(tmp_path / "report"),
    ]
    assert run(compress_zarr.main, compress_zarr.Settings, compress_zarr.__doc__, argv) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"bits_per_value", "psnr", "points", "path"} <= set(result)
    rows = Warehouse.open(result["path"]).table("files.parquet", ["size"])["size"].to_pylist()
    assert result["bits_per_value"] == pytest.approx(8 * sum(rows) / np.isfinite(whole(cube)).sum())
    ours = [point for point in result["points"] if point["codec"] == "VQ-VAE"]
    assert [(point["levels"], point["rate_weight"]) for point in ours] == [
        (2, 0.2),
        (1, 0),
        (2, 0),
        (2, 0.05),
        (2, 0.1),
        (2, 0.4),
        (2, 0.8),
        (2, 1.6),
    ]
    assert all(
        {"bits_per_value", "psnr", "rmse", "miou", "canopy_mae"} <= set(point) for point in ours
    )
    assert ours[1]["bytes"] < ours[2]["bytes"]
    lengths = [
        point["ideal_codes_bytes"]
        for point in sorted(ours, key=lambda point: point["rate_weight"])
        if point["levels"] == 2
    ]
    assert lengths == sorted(lengths, reverse=True), "a bit that costs more is used less"
    rates = Counter(point["codec"] for point in result["points"])
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert min(rates.values()) >= 5, "five rates of every codec"
    assert report["few_rates"] == {}
    assert {
        "float16, mantissa rounded, + zstd",
        "int8 + zstd",
        "bit rounding + zstd",
        "ZFP",
        "SZ3",
        "JPEG 2000",
        "PCA over features + JPEG 2000",
    } <= set(rates)
    text = (tmp_path / "report/report.md").read_text()
    assert all(f"| {name} |" in text for name in rates)
    for name in ("level", "class"):
        assert report["lossless_categories"][name]["best"] in text
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.json",
        "report.md",
        "report.png",
    }


def test_codes_are_inspected_and_exported(
    made: tuple[Warehouse, str, Warehouse], tmp_path: Path
) -> None:
    codes = made[2]
    assert write_contact_sheet(codes, InspectSettings(output=str(tmp_path / "sheet.png"))) is None
    rows = export(codes, tmp_path / "tables")
    assert rows["samples.parquet"] == sum(len(codes.split(name)) for name in codes.splits)
    table = pq.read_table(tmp_path / "tables" / "summary.parquet").to_pylist()
    assert {row["key"]: json.loads(row["value"]) for row in table} == codes.manifest.summary
