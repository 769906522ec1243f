"""Text detection items.

Real ICDAR pictures, polygons of any length, EXIF, the cache, and input of no use.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_fakes import same
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_fakes import DATA, encoded, picture, write_picture
from PIL import Image

from ingest.pictures.images import decode_rgb
from ingest.text.items import TextItems
from ingest.text.maps import TextMapSettings
from ingest.text.records import parse_icdar, parse_mmocr
from utils.caching.cached_loader import CachedLoader
from utils.caching.tensor_cache import CachedDataset, CacheKey, fingerprint
from warehouse.errors import AnnotationError, ConfigError, PictureError, SourceError, WarehouseError

ICDAR = DATA / "icdar_toy"


@pytest.mark.usefixtures("shared_data")
def test_the_toy_set_is_read_by_name_not_by_place():
    items = TextItems(ICDAR, Path("textdet_test.json"), (384, 640))
    listed = json.loads((ICDAR / "textdet_test.json").read_text())["data_list"]
    assert (len(items), len(listed)) == (10, 10)
    assert [entry["img_path"] for entry in listed] != sorted(
        entry["img_path"] for entry in listed
    ), "the trap of this set"
    found = [items[at] for at in range(10)]
    assert sum(len(item["polygons"]) for item in found) == 82
    assert sum(int(item["ignore"].sum()) for item in found) == 61
    for entry, item in zip(listed, found, strict=True):
        assert item["source"] == entry["img_path"]
        pixels, _ = decode_rgb((ICDAR / item["source"]).read_bytes(), name="", max_pixels=10**9)
        small = np.asarray(Image.fromarray(pixels).resize((640, 360), Image.Resampling.BOX))
        assert np.abs(item["image"][:, 12:372].transpose(1, 2, 0).astype(int) - small).max() <= 1
        assert (item["image"][:, :12] == 114).all()
        assert item["ignore"].tolist() == [instance["ignore"] for instance in entry["instances"]]
        for polygon, instance in zip(item["polygons"], entry["instances"], strict=True):
            there = np.c_[polygon, np.ones(len(polygon))] @ item["inverse"].T
            assert np.allclose(there[:, :2].reshape(-1), instance["polygon"], atol=1e-3)
            assert np.array_equal(there[:, 2], np.ones(len(polygon)))
        assert (item["shape"], item["raw_size"], item["orientation"]) == (
            (384, 640),
            (720, 1280),
            1,
        )
        assert item["probability"].shape == item["threshold_mask"].shape == (96, 160)


def mmocr(entries):
    return json.dumps(
        {"metainfo": {"dataset_type": "TextDetDataset"}, "data_list": entries}
    ).encode()


def entry(path, polygons, size=(64, 48), **more):
    instances = [
        {"polygon": polygon, "bbox": [0, 0, 1, 1], "bbox_label": 0, "ignore": False}
        for polygon in polygons
    ]
    return (
        {"img_path": path, "instances": instances}
        | ({"width": size[0], "height": size[1]} if size else {})
        | more
    )


def folder_of(root: Path, entries, pictures=("a.jpg",)) -> Path:
    for at, name in enumerate(pictures):
        write_picture(root / name, seed=at)
    (root / "text.json").write_bytes(mmocr(entries))
    return root


def opened(root: Path, **options) -> TextItems:
    return TextItems(root, Path("text.json"), (48, 64), **options)


def test_polygons_of_any_length_and_pictures_without_text(tmp_path):
    circle = [
        round(value, 2)
        for t in np.arange(20) / 20 * math.tau
        for value in (32 + 12 * math.cos(t), 24 + 12 * math.sin(t))
    ]
    items = opened(
        folder_of(
            tmp_path,
            [entry("b.jpg", []), entry("a.jpg", [circle, [2, 2, 14, 2, 8, 14]])],
            ("a.jpg", "b.jpg"),
        )
    )
    assert [len(polygon) for polygon in items[1]["polygons"]] == [20, 3]
    assert items[0]["polygons"] == []
    assert items[0]["ignore"].shape == (0,)
    assert items[0]["probability_mask"].all()
    assert not items[0]["threshold_mask"].any()


def test_icdar_lines_with_a_mark_commas_and_ignored_text(tmp_path):
    lines = (
        "\ufeff377,117,463,117,465,130,378,130,Genaxis, "
        "Theatre\r\n493,115,519,115,519,131,493,131,###\r\n\r\n1,1,9,1,9,9,1,9,\n"
    )
    found = parse_icdar(lines.encode(), "gt_img_1.txt", "img_1")
    assert [region.text for region in found.regions] == ["Genaxis, Theatre", "###", ""]
    assert [region.ignore for region in found.regions] == [False, True, False]
    assert found.regions[0].polygon.tolist() == [[377, 117], [463, 117], [465, 130], [378, 130]]
    for name, line in (
        ("img_2", "4,4,40,6,40,30,4,28,caf\u00e9"),
        ("img_10", "8,8,30,8,30,30,8,30,###"),
    ):
        write_picture(tmp_path / f"{name}.jpg", seed=len(name))
        (tmp_path / f"gt_{name}.txt").write_text(line, encoding="utf-8-sig")
    items = TextItems(tmp_path, Path(), (48, 64))
    assert {item["source"]: item["text"] for item in (items[0], items[1])} == {
        "img_10.jpg": ["###"],
        "img_2.jpg": ["caf\u00e9"],
    }
    json_items = opened(
        folder_of(tmp_path, [entry("img_2.jpg", [[4, 4, 40, 6, 40, 30, 4, 28]])], ())
    )
    plain = next(item for item in (items[0], items[1]) if item["source"] == "img_2.jpg")
    for key in (
        "image",
        "probability",
        "threshold",
        "probability_mask",
        "threshold_mask",
        "inverse",
    ):
        assert np.array_equal(plain[key], json_items[0][key]), key


STORED = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
"""EXIF orientation -> Pillow's transposition that makes the stored picture of the upright one."""


# Where turning keeps the size nothing tells the frames apart: the picture as shown is meant.
@pytest.mark.parametrize(
    ("orientation", "frame"),
    [(way, "shown") for way in range(1, 9)] + [(way, "stored") for way in range(5, 9)],
)
def test_polygons_follow_a_turned_picture(tmp_path, orientation, frame):
    upright = np.zeros((80, 120, 3), np.uint8)
    upright[10:30, 20:80] = 255
    image = Image.fromarray(upright)
    stored = (
        image
        if STORED[orientation] is None
        else image.transpose(Image.Transpose(STORED[orientation]))
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    ys, xs = np.nonzero(np.asarray(image if frame == "shown" else stored)[..., 0])
    x1, y1, x2, y2 = int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1
    size = image.size if frame == "shown" else stored.size
    root = folder_of(tmp_path, [entry("a.png", [[x1, y1, x2, y1, x2, y2, x1, y2]], size)], ())
    item = TextItems(root, Path("text.json"), (80, 120))[0]
    assert sorted(map(tuple, item["polygons"][0].tolist())) == [
        (20, 10),
        (20, 30),
        (80, 10),
        (80, 30),
    ]
    assert item["image"][0, 10:30, 20:80].min() == 255
    assert (item["orientation"], item["raw_size"]) == (orientation, (80, 120))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("shared_data")
def test_a_cached_loader_gives_ragged_items_as_they_are_for_any_number_of_workers(workers):
    items = TextItems(ICDAR, Path("textdet_test.json"), (96, 160))
    plain = [items[at] for at in range(len(items))]
    assert len({len(item["polygons"]) for item in plain}) > 3, "ragged"
    context = multiprocessing.get_context("fork") if workers else None
    loader = CachedLoader(
        CachedDataset(items),
        batch_size=4,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context=context,
    )
    for _ in range(2):
        batches = list(loader)
        assert list(map(len, batches)) == [4, 4, 2]
        assert same([item for batch in batches for item in batch], plain)
    assert loader.dataset.cache.stats.items == len(items)


@pytest.mark.usefixtures("shared_data")
def test_items_go_through_the_cache_unchanged_and_are_kept_for_the_next_run(tmp_path):
    items = TextItems(ICDAR, Path("textdet_test.json"), (96, 160))
    key = CacheKey(items.version, "test", fingerprint(items))
    for run in range(2):
        cached = CachedDataset(items, key=key, folder=tmp_path)
        for at in (0, 4, 0):
            got, want = cached[at], items[at]
            assert list(got) == list(want)
            for name, value in want.items():
                if isinstance(value, np.ndarray):
                    assert got[name].dtype == value.dtype
                    assert np.array_equal(got[name], value), name
                elif name == "polygons":
                    assert all(
                        np.array_equal(one, two) for one, two in zip(got[name], value, strict=True)
                    )
                else:
                    assert type(got[name]) is type(value)
                    assert got[name] == value
            got["image"][:] = 0
            got["polygons"].clear()
        assert cached.cache.stats.misses == (2 if run == 0 else 0)
    other = TextItems(
        ICDAR, Path("textdet_test.json"), (96, 160), TextMapSettings(shrink_ratio=0.5)
    )
    assert other.version == items.version
    assert fingerprint(other) != fingerprint(items)


BOW = [4, 4, 40, 30, 40, 4, 4, 30]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (b"{", AnnotationError, r"JSON does not parse.*text\.json"),
        (b"\xff\xfe", AnnotationError, "JSON does not parse"),
        (b"[" * 100_000, AnnotationError, "JSON does not parse"),
        (b'{"images": []}', AnnotationError, "data_list"),
        (
            mmocr([entry("a.jpg", [[1, 1, 9, 9]])]),
            AnnotationError,
            r"three points.*data_list\[0\] \(a\.jpg\), instances\[0\].*4 numbers",
        ),
        (mmocr([entry("a.jpg", [[1, 1, 9, 9, 3, 3, 4]])]), AnnotationError, "7 numbers"),
        (mmocr([entry("a.jpg", ["1,1,9,9,3,4"])]), AnnotationError, "not a list of numbers"),
        (mmocr([entry("a.jpg", [[1, 1, math.nan, 9, 3, 4]])]), AnnotationError, "not a place"),
        (mmocr([entry("a.jpg", [[1, 1, 10**400, 9, 3, 4]])]), AnnotationError, "not a place"),
        (mmocr([entry("gone.jpg", [])]), AnnotationError, r"no picture.*gone\.jpg"),
        (mmocr([entry("a.jpg", []), entry("./a.jpg", [])]), AnnotationError, "listed twice"),
        (mmocr([entry("../text.json", [])]), WarehouseError, r"\.\./"),
        (mmocr([entry("a.jpg", [], (640, 480))]), AnnotationError, "640 x 480, found 64 x 48"),
        (mmocr([entry("a.jpg", [BOW])]), AnnotationError, r"self_intersecting.*polygon 0.*faulty"),
        (mmocr([entry("a.jpg", [[1, 1, 9, 9, 17, 17]])]), AnnotationError, "zero_area"),
        (mmocr([entry("a.jpg", [[70, 1, 90, 1, 90, 20]])]), AnnotationError, "outside"),
        (mmocr([entry("text.json", [], None)]), PictureError, "text.json"),
        (mmocr([entry("a.jpg", [], instances=None)]), AnnotationError, "no instances"),
        (mmocr([{"instances": []}]), AnnotationError, "img_path"),
    ],
)
def test_input_of_no_use_is_refused_by_file_and_entry(tmp_path, change, error, match):
    root = folder_of(tmp_path, [])
    (root / "text.json").write_bytes(change)
    with pytest.raises(error, match=match) as caught:
        opened(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"1,1,9,1,9,9,text", r"line 1.*x1,y1"),
        (b"\n1,1,9,1,9,9,one,9,text", "line 2"),
        (b"1,1,9,1,9,9,1,1e3,text", "line 1"),
        (b"\xff\xff1,1", "not UTF-8"),
        (b"1,1,9,1,9,9,1,99999999999,text", "not a place"),
    ],
)
def test_lines_of_no_use_are_refused_by_number(line, match):
    with pytest.raises(AnnotationError, match=match):
        parse_icdar(line, "gt_a.txt", "a")


def test_a_folder_of_lines_without_its_pictures_is_refused(tmp_path):
    with pytest.raises(SourceError, match="gt_"):
        TextItems(tmp_path, Path(), (48, 64))
    (tmp_path / "gt_a.txt").write_text("1,1,9,1,9,9,1,9,x")
    with pytest.raises(AnnotationError, match=r"no picture.*gt_a\.txt"):
        TextItems(tmp_path, Path(), (48, 64))
    write_picture(tmp_path / "a.jpg")
    (tmp_path / "a.png").write_bytes(encoded(picture(), "PNG"))
    with pytest.raises(AnnotationError, match="several pictures"):
        TextItems(tmp_path, Path(), (48, 64))
    with pytest.raises(SourceError, match="no such annotation"):
        TextItems(tmp_path, Path("none.json"), (48, 64))


def test_faulty_polygons_may_be_masked_instead(tmp_path):
    polygons = [BOW, [1, 1, 9, 9, 17, 17], [70, 1, 90, 1, 90, 20], [44, 4, 60, 4, 60, 20, 44, 20]]
    item = opened(folder_of(tmp_path, [entry("a.jpg", polygons)]), faulty="ignore")[0]
    assert item["ignore"].tolist() == [True, True, True, False]
    hull = np.zeros((12, 16), bool)
    hull[1:7, 1:10] = True  # centres within 4..30 and 4..40
    assert np.array_equal(~item["probability_mask"], hull)
    assert item["probability"].any()
    already = entry("a.jpg", [BOW])
    already["instances"][0]["ignore"] = True
    assert opened(folder_of(tmp_path, [already]))[0]["ignore"].tolist() == [True], (
        "what is ignored anyway need not be mended"
    )


@pytest.mark.parametrize("size", [(50, 64), (0, 64), (48,)])
def test_a_canvas_that_does_not_divide_is_refused(tmp_path, size):
    with pytest.raises(ConfigError, match="multiples of 4"):
        TextItems(folder_of(tmp_path, []), Path("text.json"), size)


def test_impossible_settings_are_refused(tmp_path):
    for bad in ({"stride": 0}, {"shrink_ratio": 1.0}, {"low": 0.8}, {"min_side": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            TextMapSettings(**bad)
    with pytest.raises(ConfigError, match="faulty"):
        opened(folder_of(tmp_path, []), faulty="drop")


def test_a_picture_that_changed_after_opening_is_refused(tmp_path):
    items = opened(folder_of(tmp_path, [entry("a.jpg", [])]))
    write_picture(tmp_path / "a.jpg", 32, 32)
    with pytest.raises(SourceError, match="changed"):
        items[0]
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(SourceError, match=r"a\.jpg"):
        items[0]


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(st.sampled_from(["polygon", "ignore", "text", "x"]), part, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "img_path": nested,
                "instances": st.lists(st.fixed_dictionaries({"polygon": nested}) | nested),
            }
        )
    )
)
def test_any_json_is_read_or_refused_by_type(entries):
    try:
        found = parse_mmocr(mmocr(entries), "x.json")
    except AnnotationError:
        return
    assert len(found) == len(entries)


@settings(deadline=None, max_examples=150)
@given(
    st.binary(max_size=60) | st.from_regex(r"(-?\d+,){6,9}.{0,5}", fullmatch=True).map(str.encode)
)
def test_any_bytes_are_read_or_refused_by_type(data):
    with contextlib.suppress(AnnotationError):
        assert parse_icdar(data, "gt_a.txt", "a").source == "a"


@pytest.mark.usefixtures("shared_data")
def test_the_example_in_the_docs_runs(tmp_path, monkeypatch):
    shutil.copytree(ICDAR, tmp_path / "icdar_toy")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"```python\n(.*?)```",
        (Path(__file__).parents[2] / "docs" / "text.md").read_text(),
        re.DOTALL,
    )
    exec(compile(code, "docs/text.md", "exec"), {})
    with Image.open("text.png") as drawn:
        assert drawn.size[0] > 300
