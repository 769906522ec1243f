"""Which settings decide the name of a version: a table that lists every field.

A new setting fails these tests until it stands in a table with a value that differs from its
default, so that nobody adds one without deciding whether it is content.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from features.settings import FeatureSettings
from ingest.jobs import open_job
from ingest.rasters.raster_listing import cube_recipe
from ingest.rasters.settings import RasterFeature, RasterSettings
from scripts import build_zarr
from segmentation.settings import SegmentSettings
from utils.config.sections import nested_model
from vqvae.settings import CompressSettings
from warehouse.format.manifest import version_name
from warehouse.section import (
    ADDED_LATER,
    NOT_CONTENT,
    PICTURES_ONLY,
    RECORDED_APART,
    Marker,
    Section,
)
from warehouse.settings import BuildSettings

ROOT = Path(__file__).parents[2]

BUILD: dict[str, Any] = {
    "input_root": "other",
    "format": "folder",
    "output_root": "elsewhere",
    "target_size": (48, 32),
    "resize_mode": "stretch",
    "pad_value": 1,
    "max_boxes": 3,
    "too_many_boxes": "truncate",
    "dtype": "float16",
    "shard_samples": 64,
    "compressor": "none",
    "skip_empty": True,
    "missing_is_empty": True,
    "classes": ["cell"],
    "splits": {"train": 1.0},
    "seed": 1,
    "group_pattern": None,
    "max_pixels": 1_000_000,
    "mask_values": {0: 0, 255: 1, 7: 2},
    "if_exists": "clear",
    "max_invalid": 1,
    "max_missing": 1,
    "max_empty_ratio": 1.0,
    "workers": 1,
    "cluster": "tcp://head:8786",
    "trace": "elsewhere/trace.jsonl",
    "rehash": True,
    "dry_run": True,
}
RASTER: dict[str, Any] = {
    "grid": {"like": "a.tif"},
    "grid.like": {"like": "a.tif"},
    "grid.crs": {"crs": "EPSG:32633", "resolution": 1.0, "bounds": (0, 0, 9, 9)},
    "grid.resolution": {"crs": "EPSG:32632", "resolution": 2.0, "bounds": (0, 0, 9, 9)},
    "grid.bounds": {"crs": "EPSG:32632", "resolution": 1.0, "bounds": (0, 0, 8, 9)},
    "grid.geojson": {"geojson": "a.json"},
    "time": {"format": "%y"},
    "time.pattern": {"pattern": "(?P<date>.+)"},
    "time.format": {"format": "%y"},
    "time.file": {"file": "dates.json"},
    "features": ({"name": "b", "files": "*.tif"},),
    "chunk": {"time": 1},
    "chunk.time": {"time": 1},
    "chunk.y": {"y": 16},
    "chunk.x": {"x": 16},
    "chunk.feature": {"feature": 1},
    "shard": {"time": 10},
    "shard.time": {"time": 10},
    "shard.y": {"y": 64},
    "shard.x": {"x": 64},
    "block": {"time": 10},
    "block.time": {"time": 10},
    "block.y": {"y": 64},
    "block.x": {"x": 64},
    "guard": 1,
    "held_out_dates": 1,
    "empty_dates": "keep",
}
FEATURE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "name": ({}, {"name": "b"}),
    "files": ({}, {"files": "b*.tif"}),
    "band": ({}, {"band": 2}),
    "kind": ({}, {"kind": "canopy"}),
    "codes": (
        {"kind": "categorical", "codes": (1,)},
        {"kind": "categorical", "codes": (1, 2)},
    ),
    "nodata": ({}, {"nodata": 0.0}),
    "resampling": ({}, {"resampling": "nearest"}),
    "static": ({}, {"static": True}),
    "index": (
        {"red": 1, "nir": 2, "index": "ndvi"},
        {"red": 1, "nir": 2, "index": "cover"},
    ),
    "red": ({}, {"red": 1}),
    "green": ({}, {"green": 1}),
    "nir": ({}, {"nir": 1}),
    "source": ({}, {"source": "b"}),
    "breaks": (
        {
            "kind": "categorical",
            "codes": (1, 2),
            "index": "classes",
            "source": "above",
            "breaks": (1.0,),
        },
        {
            "kind": "categorical",
            "codes": (1, 2),
            "index": "classes",
            "source": "above",
            "breaks": (2.0,),
        },
    ),
    "mask": ({}, {"mask": "m*.tif"}),
    "extent": ({}, {"extent": "a.json"}),
    "units": ({}, {"units": "m"}),
}
FEATURES: dict[str, Any] = {
    "warehouse": "w",
    "encoder": "other",
    "size": 32,
    "seed": 1,
    "offline": True,
    "feature_map": True,
    "picture_label": "commonest",
    "job_size": 8,
    "jobs": 1,
    "batch_size": 4,
    "output_root": "o",
    "work": "w",
    "export_npz": True,
}
COMPRESS: dict[str, Any] = {
    "warehouse": "w",
    "checkpoint": "c",
    "output_root": "o",
    "levels": 1,
    "rate_weight": 0.5,
    "paths": 1,
    "shard_samples": 8,
    "reconstruct": "r",
    "report": "r",
    "report_samples": 8,
    "workers": 1,
    "if_exists": "clear",
    "device": "auto",
}
# What decides the weights reaches a version of predictions by their digest.
SEGMENT: dict[str, Any] = {
    "epochs": 1,
    "max_minutes": 1.0,
    "batch_size": 8,
    "lr": 0.1,
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "average": 0.5,
    "accumulate": 2,
    "seed": 1,
    "device": "cpu",
    "precision": "float32",
    "log_interval": 1,
    "evaluate_every": 2,
    "status_file": "s",
    "limit_batches": 1,
    "cache_transformed_tensors": True,
    "cache_limit_mb": 1,
    "output": "o",
    "resume": False,
    "width": 8,
    "levels": 3,
    "stem": 4,
    "dice_weight": 0.5,
    "turns": False,
    "elastic": 1.0,
    "contrast": 0.1,
    "brightness": 0.1,
    "input_root": "i",
    "mask_values": {0: 0, 7: 1},
    "splits": {"train": 1.0},
    "group_pattern": "(a)",
    "patch_size": 128,
    "overlap": 32,
    "channels": 1,
    "job_size": 8,
    "jobs": 1,
    "max_pixels": 1_000_000,
    "max_invalid": 1,
    "chunks_per_batch": 1,
    "checkpoint": "c",
    "blend": "constant",
    "boundary_tolerance": 1.0,
}
PATCHES = {
    "seed",
    "splits",
    "group_pattern",
    "patch_size",
    "overlap",
    "channels",
    "job_size",
    "max_pixels",
}
"""What release 0.1 put into the recipe of a version of patches, beside mask_values."""


def markers(model: type[Section], path: str) -> set[Marker]:
    """Those of the key at a path such as chunk.feature."""
    *outer, key = path.split(".")
    for each in outer:
        model = cast("type[Section]", nested_model(model, each))
    return {each for each in model.model_fields[key].metadata if isinstance(each, Marker)}


def paths_of(model: type[Section], prefix: str = "") -> set[str]:
    paths = set()
    for key in model.model_fields:
        paths.add(prefix + key)
        inner = nested_model(model, key)
        if inner is not None:
            paths |= paths_of(cast("type[Section]", inner), f"{prefix}{key}.")
    return paths


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of VOC pictures: `same` and `other`."""
    root = tmp_path_factory.mktemp("pictures")
    box = "<xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>25</ymax>"
    text = (
        "<annotation><size><width>40</width><height>30</height></size>"
        f"<object><name>cell</name><bndbox>{box}</bndbox></object></annotation>"
    )
    for seed, name in enumerate(("same", "other")):
        generator = np.random.default_rng(seed)
        (root / name).mkdir()
        for at in range(6):
            pixels = generator.integers(0, 255, (30, 40, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"p{at}.jpg")
            (root / name / f"p{at}.xml").write_text(text)
    return root


def name_of_pictures(root: Path, **changed: Any) -> str:
    if "input_root" in changed:
        changed["input_root"] = str(root / changed["input_root"])
    values = {"input_root": str(root / "same"), "target_size": (32, 32), **changed}
    return version_name(open_job(BuildSettings(**values), RasterSettings()).recipe)[0]


@pytest.mark.parametrize("key", BUILD)
def test_each_setting_of_a_build_of_pictures_is_of_the_kind_that_it_says(
    pictures: Path, key: str
) -> None:
    changed = name_of_pictures(pictures, **{key: BUILD[key]}) != name_of_pictures(pictures)
    # The values of masks decide nothing where there are none; see below.
    content = NOT_CONTENT not in markers(BuildSettings, key) and key != "mask_values"
    assert changed == content


def test_the_values_of_masks_are_content_where_there_are_masks(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / "same" / folder).mkdir(parents=True)
        pixels = np.zeros((30, 40) if folder == "masks" else (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "same" / folder / "a.png")
    values = [{0: 0, 255: 1}, {0: 0, 7: 1}]
    names = {name_of_pictures(tmp_path, format="masks", mask_values=each) for each in values}
    assert len(names) == 2


def test_no_byte_of_a_version_depends_on_what_is_not_content(
    pictures: Path, tmp_path: Path
) -> None:
    """Two builds, the second with every such setting changed."""
    marked = {key for key in BUILD if NOT_CONTENT in markers(BuildSettings, key)}
    # A cluster is tested elsewhere, and a dry run writes nothing.
    changed = {key: BUILD[key] for key in marked - {"cluster", "dry_run"}}
    changed |= {"output_root": str(tmp_path / "b"), "trace": str(tmp_path / "far" / "trace.jsonl")}
    fixed = {"input_root": str(pictures / "same"), "target_size": (32, 32)}
    versions = []
    for more in ({"output_root": str(tmp_path / "a"), "workers": 0}, changed):
        build = BuildSettings(**fixed | more)
        settings = build_zarr.Settings(build=build, raster=RasterSettings())
        versions.append(Path(str(build_zarr.main(settings)["path"])))

    assert versions[0].name == versions[1].name
    first, second = (files_of(version) for version in versions)
    assert first.pop("trace.jsonl")
    assert "trace.jsonl" not in second
    assert first == second
    assert len((tmp_path / "far" / "trace.jsonl").read_text().splitlines()) >= 1


def files_of(version: Path) -> dict[str, bytes | dict[str, Any]]:
    files: dict[str, bytes | dict[str, Any]] = {
        path.relative_to(version).as_posix(): path.read_bytes()
        for path in version.rglob("*")
        if path.is_file()
    }
    manifest = json.loads((version / "manifest.json").read_text())
    # The digest of the manifest covers the thresholds.
    del manifest["thresholds"], manifest["manifest_sha256"]
    files["manifest.json"] = manifest
    return files


def name_of_cube(build: BuildSettings | None = None, **changed: Any) -> str:
    values = {"features": ({"name": "a", "files": "*.tif"},), **changed}
    listing: Any = SimpleNamespace(fingerprint="of the sources", format="raster")
    raster = RasterSettings(**values)
    return version_name(cube_recipe(listing, build or BuildSettings(), raster))[0]


@pytest.mark.parametrize("path", RASTER)
def test_each_setting_of_a_cube_is_of_the_kind_that_it_says(path: str) -> None:
    base = {}
    if path in {"grid.crs", "grid.resolution", "grid.bounds"}:
        base = {"grid": {"crs": "EPSG:32632", "resolution": 1.0, "bounds": (0, 0, 9, 9)}}
    changed = name_of_cube(**{path.split(".", maxsplit=1)[0]: RASTER[path]}) != name_of_cube(**base)
    assert changed == (NOT_CONTENT not in markers(RasterSettings, path))


@pytest.mark.parametrize("key", FEATURE)
def test_each_key_of_a_feature_of_a_cube_is_content(key: str) -> None:
    names = {
        name_of_cube(
            features=(
                {"name": "above", "files": "*.tif"},
                {"name": "a", "files": "*.tif", **change},
            )
        )
        for change in FEATURE[key]
    }
    assert len(names) == 2


@pytest.mark.parametrize("key", BUILD)
def test_a_cube_is_named_by_the_settings_of_a_build_that_it_has_a_use_for(key: str) -> None:
    changed = name_of_cube(BuildSettings(**{key: BUILD[key]})) != name_of_cube()
    unused = {NOT_CONTENT, RECORDED_APART, PICTURES_ONLY}
    assert changed == (not unused & markers(BuildSettings, key))


@pytest.mark.parametrize(
    ("model", "table"), [(FeatureSettings, FEATURES), (CompressSettings, COMPRESS)]
)
def test_each_setting_of_a_derived_version_is_of_the_kind_that_it_says(
    model: type[Section], table: dict[str, Any]
) -> None:
    for key, value in table.items():
        changed = model(**{key: value}).content() != model().content()
        assert changed == (not {NOT_CONTENT, RECORDED_APART} & markers(model, key)), key


@pytest.mark.parametrize("key", SEGMENT)
def test_each_setting_of_patches_is_of_the_kind_that_it_says(key: str) -> None:
    changed = SegmentSettings(**{key: SEGMENT[key]}).content() != SegmentSettings().content()
    assert changed == (key in PATCHES)


@pytest.mark.parametrize(
    ("model", "table"),
    [
        (BuildSettings, BUILD),
        (RasterSettings, RASTER),
        (FeatureSettings, FEATURES),
        (CompressSettings, COMPRESS),
        (SegmentSettings, SEGMENT),
    ],
)
def test_the_tables_list_every_setting(model: type[Section], table: dict[str, Any]) -> None:
    inside_a_list = {f"features.{key}" for key in RasterFeature.model_fields}
    assert set(table) == paths_of(model) - inside_a_list


def test_the_table_lists_every_key_of_a_feature() -> None:
    assert set(FEATURE) == set(RasterFeature.model_fields)


def test_a_setting_younger_than_the_release_keeps_the_names_of_versions() -> None:
    """Either it is marked as added later, or the version in pyproject.toml is raised with it."""
    recipes = json.loads((ROOT / "tests" / "data" / "recipes_0_1.json").read_text())
    first: dict[str, set[str]] = {}
    for stored in recipes.values():
        known = first.setdefault(stored["recipe"]["format"], set())
        known |= set(stored["recipe"]["settings"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if project["version"] != "0.1.0":
        return
    now = {
        "voc": set(BuildSettings().content()),
        "features": set(FeatureSettings().content()),
        "codes": set(CompressSettings().content()),
        "patches": set(SegmentSettings().content()),
    }
    for kind, keys in now.items():
        assert keys <= first[kind], f"mark what is new in {kind} as ADDED_LATER"


def test_a_setting_that_was_added_later_enters_the_recipe_only_where_it_is_not_the_default() -> (
    None
):
    assert markers(RasterSettings, "chunk.feature") == {ADDED_LATER}
    assert "feature" not in RasterSettings().content()["chunk"]
    assert RasterSettings.model_validate({"chunk": {"feature": 2}}).content()["chunk"] == {
        "time": 5,
        "y": 32,
        "x": 32,
        "feature": 2,
    }
