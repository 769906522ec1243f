"""Real third-party sets: everything found is kept or rejected, and boxes survive the letterbox.

Skipped where the data is absent.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from xml.etree import ElementTree

import numpy as np
import pytest
from ingest_fakes import DATA, listed
from PIL import Image

from ingest.pictures.images import load_sample
from ingest.pictures.thresholds import check_thresholds
from ingest.pictures.validate import scan

CASES = {
    "bccd": ({"max_boxes": 30}, "voc", 218, 218),
    "rbc_coco": ({"max_boxes": 40}, "coco", 240, 240),
    "coco_yolo": ({"max_boxes": 50, "max_missing": 1}, "yolo", 31, 30),
    "sign_digits": ({}, "folder", 300, 300),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def scanned(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"the real data set {name} is not here")
    listing, settings = listed(DATA / name, **CASES[name][0])
    result = scan(listing, settings)
    check_thresholds(result, settings)
    return listing, settings, result


def truth(name) -> dict[str, list[list[float]]]:
    """Boxes a picture as xyxy pixels, read without any code of ours."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    if name == "bccd":
        for path in (DATA / name / "Annotations").glob("*.xml"):
            for box in ElementTree.parse(path).getroot().iter("bndbox"):
                found[path.stem].append(
                    [float(box.find(key).text) for key in ("xmin", "ymin", "xmax", "ymax")]
                )
    elif name == "rbc_coco":
        for path in (DATA / name).glob("*/_annotations.coco.json"):
            content = json.loads(path.read_text())
            names = {image["id"]: image["file_name"][:-4] for image in content["images"]}
            for item in content["annotations"]:
                x, y, w, h = item["bbox"]
                found[names[item["image_id"]]].append([x, y, x + w, y + h])
    else:
        for path in (DATA / name / "labels").rglob("*.txt"):
            with Image.open(next((DATA / name / "images").rglob(path.stem + ".jpg"))) as image:
                width, height = image.size
            for _, x, y, w, h in (
                map(float, line.split()) for line in path.read_text().splitlines()
            ):
                found[path.stem].append(
                    [
                        (x - w / 2) * width,
                        (y - h / 2) * height,
                        (x + w / 2) * width,
                        (y + h / 2) * height,
                    ]
                )
    return found


@pytest.mark.parametrize("name", CASES)
def test_everything_found_is_kept_or_rejected(name):
    _, kind, found, kept = CASES[name]
    listing, _, result = scanned(name)
    assert (listing.format, result.found, result.kept) == (kind, found, kept)
    assert result.found == result.kept + result.rejected_pictures


@pytest.mark.parametrize("name", ["bccd", "rbc_coco", "coco_yolo"])
def test_boxes_read_back_through_the_letterbox_equal_the_annotations_within_half_a_pixel(name):
    listing, settings, result = scanned(name)
    expected = truth(name)
    dropped = defaultdict(int)
    for item in result.rejected:
        dropped[item.path] += item.kind == "box"
    height, width = settings.target_size
    for record in result.records:
        sample, _ = load_sample(record, listing.root, settings, len(result.class_names))
        scale_x, scale_y, pad_x, pad_y, raw_width, raw_height = sample["letterbox"].astype(
            np.float64
        )
        pixels = sample["box"][sample["box_mask"]].astype(np.float64) * [
            width,
            height,
            width,
            height,
        ]
        back = (pixels - [pad_x, pad_y, pad_x, pad_y]) / [scale_x, scale_y, scale_x, scale_y]
        given = np.array(expected[record.source.rsplit("/", 1)[-1].rsplit(".", 1)[0]]).reshape(
            -1, 4
        )
        given = np.clip(given, 0, [raw_width, raw_height] * 2)
        assert len(back) + dropped[record.source] == len(given)
        distance = np.abs(back[:, None] - given[None]).max(axis=2)
        assert (distance.min(axis=1) < 0.5).all()


def test_coco_placeholder_classes_are_dropped_and_given_splits_kept():
    _, _, result = scanned("rbc_coco")
    assert result.class_names == ("rbc", "wbc")
    assert Counter(record.split for record in result.records) == {
        "train": 210,
        "val": 20,
        "test": 10,
    }


def test_no_parent_of_augmented_copies_is_in_two_splits():
    _, _, result = scanned("rbc_coco")
    splits = defaultdict(set)
    for record in result.records:
        splits[re.sub(r"\.rf\.[0-9a-f]+\.jpg$", "", record.source.rsplit("/", 1)[-1])].add(
            record.split
        )
    assert not [parent for parent, where in splits.items() if len(where) > 1]


def test_upper_case_extensions_are_pictures():
    listing, _, _ = scanned("sign_digits")
    assert all(path.endswith(".JPG") for path in listing.pictures)
