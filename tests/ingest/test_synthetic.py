"""The sample maker.

The same files from the same seed, boxes that fit, and a folder that is not overwritten.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from ingest_fakes import scanned

from ingest.pictures.thresholds import check_thresholds
from ingest.synthetic.make import make_sample
from ingest.synthetic.scenes import CLASSES, draw_scene
from ingest.synthetic.settings import SampleSettings
from warehouse.errors import SourceError
from warehouse.settings import BuildSettings


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(path, **options):
    make_sample(SampleSettings(output=str(path), **options))
    return path


def digests(root) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_each_form_is_recognised_and_builds_with_the_defaults(tmp_path, kind):
    root = made(tmp_path / "s", format=kind, count=36, size=(96, 128))
    result = scanned(root)
    check_thresholds(result, BuildSettings())
    assert result.format == kind
    assert (result.found, result.kept, result.counts["empty"], result.rejected) == (36, 36, 1, [])
    assert set(result.class_names) == set(CLASSES)
    for record in result.records:
        scene = draw_scene(0, int(record.source[-9:-4]), (96, 128))
        np.testing.assert_allclose(record.boxes_xyxy, scene.boxes_xyxy, atol=1e-3)
        assert [result.class_names[label] for label in record.labels] == [
            CLASSES[label] for label in scene.labels
        ]


def test_the_same_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    first = digests(made(tmp_path / "a", count=5, size=(64, 64)))
    assert first == digests(made(tmp_path / "b", count=5, size=(64, 64)))
    other = digests(made(tmp_path / "c", count=5, size=(64, 64), seed=1))
    assert not set(first.values()) & {
        digest for name, digest in other.items() if name.endswith(".jpg")
    }


def test_a_longer_set_begins_with_the_shorter_one(tmp_path):
    short, long = (
        digests(made(tmp_path / "a", count=3, size=(64, 64))),
        digests(made(tmp_path / "b", count=6, size=(64, 64))),
    )
    assert {
        name: digest for name, digest in short.items() if name != "sample.json"
    }.items() <= long.items()


def test_boxes_are_inside_tight_and_not_hidden():
    for index in range(12):
        scene = draw_scene(0, index, (200, 300))
        boxes = scene.boxes_xyxy
        assert (boxes >= 0).all()
        assert (boxes <= [300, 200, 300, 200]).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()
        assert len(boxes) == len(scene.labels) <= 16


def test_one_picture_in_33_is_empty_and_the_rest_are_not():
    empty = [index for index in range(70) if not len(draw_scene(0, index, (64, 64)).labels)]
    assert empty == [32, 65]


def test_the_single_box_variant_has_one_box_and_one_class_everywhere(tmp_path):
    result = scanned(made(tmp_path / "s", count=36, size=(64, 64), single_box=True))
    assert result.class_names == (CLASSES[0],)
    assert {len(record.labels) for record in result.records} == {1}


def test_an_earlier_sample_is_replaced_whole(tmp_path):
    made(tmp_path / "s", count=6, size=(64, 64))
    made(tmp_path / "s", count=2, size=(64, 64), format="yolo")
    assert digests(tmp_path / "s") == digests(
        made(tmp_path / "t", count=2, size=(64, 64), format="yolo")
    )


def test_a_folder_it_did_not_make_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(
        SourceError, match=r"not empty and holds no earlier sample: .*--sample\.output"
    ):
        made(tmp_path / "mine", count=1)
    made(tmp_path / "s", count=1, size=(64, 64))
    (tmp_path / "s" / "thesis.txt").write_text("x")
    with pytest.raises(SourceError, match=r"more than an earlier sample: .*found thesis\.txt"):
        made(tmp_path / "s", count=1)
    assert (tmp_path / "s" / "thesis.txt").read_text() == "x"
    assert (tmp_path / "s" / "JPEGImages" / "scene_00000.jpg").exists()


def test_an_output_that_is_a_file_or_a_link_is_refused(tmp_path):
    (tmp_path / "f").write_text("x")
    (tmp_path / "l").symlink_to(tmp_path)
    for name in ("f", "l"):
        with pytest.raises(SourceError, match="not a folder"):
            made(tmp_path / name, count=1)
