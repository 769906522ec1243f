"""Annotation formats declare themselves: a new one is a class and a call of `register`."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ingest_fakes import settings_for, voc_set, write_picture

from ingest.jobs import open_job
from ingest.rasters.settings import RasterSettings
from ingest.records import registry
from ingest.records.base import Parsed, RawBox, RawPicture
from ingest.records.formats import format_names, get_format
from ingest.records.paired_files import parse_paired_files
from ingest.records.registry import AnnotationFormat, InputFolder, files_by_stem, register
from ingest.sources.listing import SourceListing
from warehouse import Warehouse
from warehouse.errors import AnnotationError, ConfigError, SourceError
from warehouse.settings import BuildSettings
from warehouse.write.publish import bake

ROOT = Path(__file__).parents[2]


class CsvFormat(AnnotationFormat):
    """One line per box: class, x1, y1, x2, y2 in pixels."""

    name = "csv"
    expected_files = "*.csv beside the pictures or in labels/"

    def find_annotations(self, folder: InputFolder) -> tuple[str, ...]:
        return files_by_stem(folder, ".csv")

    def parse(self, listing: SourceListing) -> Parsed:
        return Parsed(*parse_paired_files(listing, read_csv, limit=1 << 20))


def read_csv(source: str, path: str, data: bytes) -> RawPicture:
    boxes = []
    for number, line in enumerate(data.decode().splitlines(), 1):
        name, *values = line.split(",")
        if len(values) != 4:
            raise AnnotationError("a line is not a box", where=f"{path}, line {number}")
        x1, y1, x2, y2 = map(float, values)
        boxes.append(RawBox((x1, y1, x2, y2), name))
    return RawPicture(source, tuple(boxes), annotation=path)


class ClassByName(AnnotationFormat):
    """The class of a picture is the start of its name; there is no file of annotations."""

    name = "prefix"
    is_recognised = False
    needs_annotations = False
    has_boxes = False
    has_picture_classes = True

    def parse(self, listing: SourceListing) -> Parsed:
        names = [Path(source).name.partition("_")[0] for source in listing.pictures]
        pictures = [
            RawPicture(source, class_name=name)
            for source, name in zip(listing.pictures, names, strict=True)
        ]
        return Parsed(tuple(pictures), class_names=tuple(sorted(set(names))))


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "REGISTERED", registry.REGISTERED.copy())
    monkeypatch.setattr("ingest.records.formats.REGISTERED", registry.REGISTERED)


def build(source: Path, **options) -> Warehouse:
    settings = settings_for(source, target_size=(48, 64), **options)
    job = open_job(settings, RasterSettings())
    root = Path(settings.output_root)
    root.mkdir()
    bake(job.plan, job.loader, root, workers=0, cluster=None, trace=False, on_plan=lambda _: None)
    return Warehouse.open(settings.output_root)


def csv_set(root: Path) -> Path:
    for number in range(3):
        write_picture(root / f"{number}.jpg", seed=number)
        (root / f"{number}.csv").write_text(f"dog,4,6,30,40\ncat,{number},0,20,24\n")
    return root


@pytest.mark.parametrize("name", ["auto", "csv"])
def test_a_registered_format_is_recognised_and_built(tmp_path, name):
    register(CsvFormat())
    split = build(csv_set(tmp_path / "set"), format=name).split("train")
    assert split.class_names == ["dog", "cat"]
    found = split.array("box")[:][split.array("box_mask")[:]]
    assert np.isclose(found, [4 / 64, 6 / 48, 30 / 64, 40 / 48]).all(axis=1).sum() == len(split)


def test_a_fault_in_a_file_of_a_registered_format_makes_its_picture_invalid(tmp_path):
    register(CsvFormat())
    root = csv_set(tmp_path / "set")
    (root / "1.csv").write_text("dog,4,6\n")
    plan = open_job(settings_for(root, max_invalid=1), RasterSettings()).plan({})
    assert [line["detail"] for line in plan.rejected] == ["a line is not a box: 1.csv, line 1"]


def test_a_registered_format_without_boxes_has_classes_of_pictures(tmp_path):
    register(ClassByName())
    for name in ("cat_1", "cat_2", "dog_1"):
        write_picture(tmp_path / "set" / f"{name}.jpg")
    version = build(tmp_path / "set", format="prefix")
    assert version.split("train").class_names == ["cat", "dog"]
    assert version.split("train").array("target").shape == (len(version.split("train")),)


def test_a_registered_format_beside_another_is_ambiguous(tmp_path):
    register(CsvFormat())
    root = voc_set(csv_set(tmp_path / "set"), {"a": [("dog", 4, 6, 30, 40)]})
    with pytest.raises(SourceError, match=r"more than one format: .*csv and voc"):
        open_job(settings_for(root), RasterSettings())


def test_a_wrong_format_lists_the_known_ones_and_the_nearest():
    register(CsvFormat())
    names = format_names()
    # `auto` first, `raster` last, and between them the annotation formats in alphabetical order.
    assert names == ("auto", *sorted(names[1:-1]), "raster")
    assert {"classes", "coco", "csv", "folder", "masks", "voc", "yolo"} <= {*names}
    message = f"expected one of {', '.join(names)}, found 'vox'; did you mean 'voc'?"
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        open_job(BuildSettings(format="vox"), RasterSettings())


def test_the_command_refuses_a_wrong_format_before_it_looks_for_sources():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.build_zarr", "--build.format", "vox"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert f"one of {', '.join(format_names())}, found 'vox'" in done.stderr
    assert "input" not in done.stderr


def test_the_help_of_the_setting_names_the_formats_of_the_product():
    words = BuildSettings.model_fields["format"].description.replace(",", "").replace(";", "")
    names = {"auto", "voc", "coco", "yolo", "masks", "classes", "folder", "raster"}
    assert names <= set(words.replace(":", "").split())


def test_every_format_says_what_it_is():
    for name in format_names()[1:-1]:
        known = get_format(name)
        assert known.name == name
        assert type(known).__doc__
        assert bool(known.expected_files) == known.needs_annotations


ONE_FILE = '''
from ingest.records.base import Parsed, RawBox, RawPicture
from ingest.records.registry import AnnotationFormat, register


class Centred(AnnotationFormat):
    """One box in the middle of every picture."""

    name = "centred"
    is_recognised = False
    needs_annotations = False

    def parse(self, listing):
        box = RawBox((8, 8, 40, 30), "thing")
        pictures = [RawPicture(path, (box,), annotation=path) for path in listing.pictures]
        return Parsed(tuple(pictures))


register(Centred())
'''


def test_a_format_is_one_file_and_one_line_that_imports_it(tmp_path, monkeypatch):
    (tmp_path / "centred_format.py").write_text(ONE_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    assert "centred" not in format_names()

    importlib.import_module("centred_format")
    del sys.modules["centred_format"]

    assert "centred" in format_names()
    write_picture(tmp_path / "set" / "a.jpg", seed=0)
    split = build(tmp_path / "set", format="centred").split("train")
    assert split.class_names == ["thing"]
    assert split.array("box_mask")[:].sum() == 1


def test_the_setting_is_free_text_that_only_the_registry_checks():
    assert BuildSettings.model_fields["format"].annotation is str
    assert BuildSettings(format="not registered").format == "not registered"
    with pytest.raises(ConfigError, match="not registered"):
        get_format("not registered")
