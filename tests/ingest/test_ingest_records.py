"""Four annotation formats become the same records; what does not parse names its file and line."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ingest_fakes import (
    coco_json,
    encoded,
    listed,
    picture,
    scanned,
    voc_set,
    voc_xml,
    write_picture,
)

from ingest.records.coco import parse_coco
from ingest.records.voc import read_voc_xml
from ingest.records.yolo import read_class_names, read_yolo_text
from warehouse.errors import AnnotationError, SourceError
from warehouse.format.schema import CROWD, DIFFICULT, TRUNCATED

BOXES = {
    "a": [("dog", 4, 6, 30, 40), ("cat", 10.5, 8, 50, 30.25)],
    "b": [("cat", 1, 2, 20, 22)],
    "c": [("dog", 0, 0, 64, 48)],
}
CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def as_coco(root) -> None:
    images, annotations = [], []
    for number, (stem, boxes) in enumerate(BOXES.items()):
        write_picture(root / "images" / f"{stem}.jpg", seed=number)
        images.append({"id": number, "file_name": f"{stem}.jpg", "width": 64, "height": 48})
        for name, x1, y1, x2, y2 in boxes:
            annotations.append(
                {
                    "image_id": number,
                    "category_id": 3 if name == "dog" else 7,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": 0,
                }
            )
    coco_json(root / "annotations" / "instances_all.json", images, CATEGORIES, annotations)


def as_yolo(root) -> None:
    (root / "labels").mkdir(parents=True)
    (root / "data.yaml").write_text("names:\n  0: dog\n  1: cat\n")
    for number, (stem, boxes) in enumerate(BOXES.items()):
        write_picture(root / "images" / f"{stem}.jpg", seed=number)
        lines = [
            f"{int(n == 'cat')} {(x1 + x2) / 128} {(y1 + y2) / 96} {(x2 - x1) / 64} "
            f"{(y2 - y1) / 48}"
            for n, x1, y1, x2, y2 in boxes
        ]
        (root / "labels" / f"{stem}.txt").write_text("\n".join(lines) + "\n\n")


@pytest.mark.parametrize(
    "make", [lambda root: voc_set(root, BOXES), as_coco, as_yolo], ids=["voc", "coco", "yolo"]
)
def test_the_three_formats_give_the_same_boxes_and_classes(tmp_path, make):
    make(tmp_path / "set")
    result = scanned(tmp_path / "set")
    assert result.class_names == ("dog", "cat")
    assert (result.found, result.kept, result.rejected) == (3, 3, [])
    for record in result.records:
        expected = BOXES[record.source[-5]]
        np.testing.assert_allclose(record.boxes_xyxy, [box[1:] for box in expected], atol=1e-9)
        assert [result.class_names[label] for label in record.labels] == [
            box[0] for box in expected
        ]


# Pascal VOC


def test_voc_difficult_and_truncated_become_flags():
    xml = voc_xml([("a", 1, 2, 3, 4)], extra="<difficult>1</difficult><truncated>1</truncated>")
    assert read_voc_xml(xml.encode(), "p")[0][0].flags == DIFFICULT | TRUNCATED
    xml = voc_xml(
        [("a", 1, 2, 3, 4)], extra="<difficult>0</difficult><truncated>Unspecified</truncated>"
    )
    assert read_voc_xml(xml.encode(), "p")[0][0].flags == 0


BOMB = (
    '<!DOCTYPE a [<!ENTITY x "ha">'
    + "".join(f'<!ENTITY x{n} "&x{n - 1 or ""};&x{n - 1 or ""};">' for n in range(1, 30))
    + "]><annotation>&x29;</annotation>"
)
BAD_XML = {
    "not closed": ("<annotation>\n<object>\n</annotation>", "XML does not parse: p.xml, line 3"),
    "empty": ("", "XML does not parse: p.xml, line 1"),
    "another root": ("<html/>", "expected <annotation>, found <html>"),
    "an entity bomb": (BOMB, "refused: p.xml"),
    "an external entity": (
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
        "refused: p.xml",
    ),
    "an unknown encoding": (
        '<?xml version="1.0" encoding="klingon"?><annotation/>',
        "XML does not parse: p.xml",
    ),
    "no box": (
        "<annotation><object><name>a</name></object></annotation>",
        "no <bndbox>: p.xml, object 1",
    ),
    "no name": (
        "<annotation><object><bndbox/></object></annotation>",
        "no class name: p.xml, object 1",
    ),
    "a corner that is text": (
        voc_xml([("a", 1, "two", 3, 4)]),
        "<ymin> is not a number: p.xml, object 1; found 'two'",
    ),
}


@pytest.mark.parametrize("case", BAD_XML)
def test_bad_xml_is_an_error_with_file_and_place(case):
    xml, message = BAD_XML[case]
    with pytest.raises(AnnotationError) as caught:
        read_voc_xml(xml.encode(), "p.xml")
    assert message in str(caught.value)


def test_deeply_nested_xml_ends_in_boxes_or_a_typed_error():
    xml = "<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>"
    assert read_voc_xml(xml.encode(), "p.xml") == ((), None)


@given(
    st.binary(max_size=200)
    | st.text(alphabet="<>/&;!ab\"'= annotationobject", max_size=200).map(str.encode)
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_arbitrary_bytes_as_xml_give_boxes_or_an_annotation_error(data):
    with contextlib.suppress(AnnotationError):
        read_voc_xml(data, "p.xml")


def test_one_bad_xml_rejects_its_picture_with_the_line_and_keeps_the_others(tmp_path):
    root = voc_set(tmp_path / "set", BOXES)
    (root / "Annotations" / "b.xml").write_text("<annotation>\n<oops>")
    result = scanned(root)
    assert (result.found, result.kept, result.counts["invalid"]) == (3, 2, 1)
    assert result.rejected[0].path == "JPEGImages/b.jpg"
    assert "Annotations/b.xml, line 2" in result.rejected[0].detail


# COCO


def one_coco(root, images=None, categories=None, annotations=(), name="_annotations.coco.json"):
    write_picture(root / "a.jpg")
    coco_json(
        root / name,
        images or [{"id": 1, "file_name": "a.jpg"}],
        categories or CATEGORIES,
        list(annotations),
    )
    return root


def entry(bbox, **more):
    return {"image_id": 1, "category_id": 3, "bbox": bbox, **more}


def test_coco_numbers_may_be_whole_or_not_and_crowds_are_flagged(tmp_path):
    result = scanned(
        one_coco(
            tmp_path / "set",
            annotations=[
                entry([1, 2.5, 10, 20.25]),
                entry([0, 0, 30, 30], iscrowd=1, segmentation=[]),
            ],
        )
    )
    assert result.records[0].boxes_xyxy.tolist() == [[1, 2.5, 11, 22.75], [0, 0, 30, 30]]
    assert result.records[0].flags.tolist() == [0, CROWD]


@pytest.mark.parametrize(
    ("categories", "used", "names"),
    [
        (
            [{"id": 0, "name": "animals"}, {"id": 1, "name": "dog", "supercategory": "animals"}],
            1,
            ("dog",),
        ),
        ([{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}], 0, ("dog", "cat")),
        (
            [
                {"id": 5, "name": "pets"},
                {"id": 2, "name": "dog", "supercategory": "pets"},
                {"id": 1, "name": "cat"},
            ],
            2,
            ("cat", "dog"),
        ),
        (
            [{"id": 5, "name": "pets"}, {"id": 2, "name": "dog", "supercategory": "pets"}],
            5,
            ("dog", "pets"),
        ),
    ],
    ids=["number 0 unused", "number 0 used", "an unused supercategory", "a used supercategory"],
)
def test_coco_categories_follow_their_numbers_and_unused_placeholders_go(
    tmp_path, categories, used, names
):
    root = one_coco(
        tmp_path / "set",
        categories=categories,
        annotations=[entry([1, 1, 20, 20], category_id=used)],
    )
    result = scanned(root)
    assert result.class_names == names
    name = next(item["name"] for item in categories if item["id"] == used)
    assert result.records[0].labels.tolist() == [names.index(name)]


def test_coco_splits_beside_their_pictures_are_kept(tmp_path):
    for number, split in enumerate(("train", "valid", "test")):
        write_picture(tmp_path / "set" / split / f"{split}.jpg", seed=number)
        coco_json(
            tmp_path / "set" / split / "_annotations.coco.json",
            [{"id": 0, "file_name": f"{split}.jpg"}],
            CATEGORIES,
            [{"image_id": 0, "category_id": 3, "bbox": [1, 1, 20, 20]}],
        )
    assert {record.source: record.split for record in scanned(tmp_path / "set").records} == {
        "test/test.jpg": "test",
        "train/train.jpg": "train",
        "valid/valid.jpg": "val",
    }


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "C:/a.jpg", "..\\a.jpg", "a\0.jpg"]
)
def test_a_coco_file_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(
        AnnotationError,
        match=r"leads out of the input folder: _annotations\.coco\.json, image id 1",
    ):
        scanned(one_coco(tmp_path / "set", images=[{"id": 1, "file_name": name}]))


def test_coco_entries_without_a_file_and_files_without_an_entry_are_missing(tmp_path):
    root = one_coco(
        tmp_path / "set",
        images=[{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "gone.jpg"}],
        annotations=[entry([1, 1, 9, 9])],
    )
    write_picture(root / "extra.jpg", seed=4)
    result = scanned(root)
    assert (result.found, result.kept) == (2, 1)
    assert {(item.path, item.kind, item.reason) for item in result.rejected} == {
        ("extra.jpg", "picture", "missing_annotation"),
        ("_annotations.coco.json", "annotation", "missing_picture"),
    }


def test_bad_coco_boxes_are_listed_with_their_reasons(tmp_path):
    odd = [
        entry([1, 1, 9, 9]),
        entry([1, 2, 3]),
        entry("box"),
        entry([1, 1, -5, 5]),
        entry([1, 1, 9, 9], category_id=99),
        entry([1, 1, 5, 5], image_id=8),
        entry([0, 0, 10**400, 3]),
    ]
    result = scanned(one_coco(tmp_path / "set", annotations=odd))
    assert sorted(item.reason for item in result.rejected) == [
        "nan",
        "nan",
        "nan",
        "reversed",
        "unknown_class",
        "unknown_picture",
    ]
    assert result.counts["boxes"] == 1


def coco_text(images, categories=()) -> str:
    return json.dumps({"images": images, "categories": list(categories), "annotations": []})


BAD_JSON = {
    "cut off": ('{"images": [\n{"id": 1},\n', "line 3"),
    "another document": ("[1, 2]", "not a COCO detection file"),
    "no categories": ('{"images": [], "annotations": []}', "'categories'"),
    "nesting without end": ('{"images": ' + "[" * 200_000, "nesting too deep"),
    "two pictures of one id": (
        coco_text([{"id": 1, "file_name": "a.jpg"}] * 2),
        "two pictures have one id",
    ),
    "a picture twice": (
        coco_text([{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}]),
        "listed twice",
    ),
    "an id that is a list": (coco_text([{"id": [1], "file_name": "a.jpg"}]), "images[0]"),
    "a category without a name": (coco_text([], [{"id": 1}]), "categories[0]"),
    "not UTF-8": (b"\xff\xfe\x00{", "does not parse"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_coco_json_is_an_error_with_its_file(tmp_path, case):
    text, message = BAD_JSON[case]
    write_picture(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "_annotations.coco.json").write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    with pytest.raises(AnnotationError) as caught:
        scanned(tmp_path / "set")
    assert message in str(caught.value)
    assert "_annotations.coco.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_annotation_file_that_changed_since_it_was_listed_is_refused(tmp_path):
    root = one_coco(tmp_path / "set")
    listing, _ = listed(root)
    (root / "_annotations.coco.json").write_text("{}")
    with pytest.raises(SourceError, match="changed while being built"):
        parse_coco(listing)


# YOLO


def one_yolo(root, lines="0 .5 .5 .5 .5\n", **files):
    write_picture(root / "images" / "a.jpg")
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text(lines)
    for name, text in files.items():
        (root / name.replace("_", ".")).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({"data_yaml": "names: [dog, cat]\n", "classes_txt": "x\ny\n"}, {0: "dog", 1: "cat"}),
        ({"data_yaml": "names:\n  0: dog\n  4: cat\n"}, {0: "dog", 4: "cat"}),
        ({"classes_txt": "dog\ncat\n"}, {0: "dog", 1: "cat"}),
        ({"obj_names": "dog\ncat\n"}, {0: "dog", 1: "cat"}),
        ({"coco8_yaml": "path: .\nnames: {0: dog}\n", "other_yaml": "a: 1\n"}, {0: "dog"}),
        ({}, None),
    ],
    ids=[
        "data.yaml wins",
        "a mapping with gaps",
        "classes.txt",
        "obj.names",
        "another yaml at the top",
        "nothing",
    ],
)
def test_yolo_names_are_found(tmp_path, files, names):
    listing, _ = listed(one_yolo(tmp_path / "set", **files))
    assert read_class_names(listing) == names


def test_yolo_names_are_all_kept_and_without_any_classes_are_numbered(tmp_path):
    assert scanned(one_yolo(tmp_path / "a", data_yaml="names: [x, y, z]")).class_names == (
        "x",
        "y",
        "z",
    )
    result = scanned(one_yolo(tmp_path / "b", "2 .5 .5 .5 .5"))
    assert result.class_names == ("class_0", "class_1", "class_2")
    assert "no list of class names" in result.warnings[0]


@pytest.mark.parametrize(
    "text",
    [
        "names: [a\n",
        "names: [a, a]",
        "names: ['', b]",
        "names: 7",
        "names: {x: a}",
        "names: {-1: a}",
        "a: &a [1]\nnames: *a",
        "names: !!python/object/apply:os.system ['true']",
        "names: " + "[" * 5000,
    ],
    ids=[
        "cut off",
        "one twice",
        "empty",
        "a number",
        "keys are words",
        "a negative key",
        "an alias",
        "a python tag",
        "deep nesting",
    ],
)
def test_bad_yolo_names_are_an_error_with_the_file(tmp_path, text):
    listing, _ = listed(one_yolo(tmp_path / "set", data_yaml=text))
    with pytest.raises(AnnotationError, match=r"data\.yaml"):
        read_class_names(listing)


def test_yolo_polygons_become_their_bounding_boxes():
    assert read_yolo_text(b"1 .1 .2 .5 .1 .3 .9\n", "p")[0] == (1, (0.1, 0.1, 0.5, 0.9))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 .5 .5 .5", "wrong length"),
        ("0 .5 .5 .5 .5 .5", "wrong length"),
        ("dog .5 .5 .5 .5", "not a number"),
        ("0.5 .5 .5 .5 .5", "whole number"),
        ("-1 .5 .5 .5 .5", "whole number"),
        ("nan .5 .5 .5 .5", "whole number"),
        ("1e9 .5 .5 .5 .5", "whole number"),
    ],
)
def test_bad_yolo_lines_are_errors_with_file_and_line(line, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        read_yolo_text(f"0 .5 .5 .1 .1\n\n{line}\n".encode(), "labels/a.txt")
    assert "labels/a.txt, line 3" in str(caught.value)


def test_a_yolo_class_without_a_name_makes_a_bad_box(tmp_path):
    result = scanned(
        one_yolo(tmp_path / "set", "0 .5 .5 .5 .5\n9 .5 .5 .2 .2\n", data_yaml="names: [dog]")
    )
    assert [(item.kind, item.reason) for item in result.rejected] == [("box", "unknown_class")]
    assert "class number 9" in result.rejected[0].detail


def test_yolo_fractions_refer_to_the_picture_as_shown(tmp_path):
    from PIL import Image

    root = one_yolo(tmp_path / "set", "0 .25 .5 .5 1\n", data_yaml="names: [dog]")
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "images" / "a.jpg").write_bytes(encoded(picture(64, 48), exif=exif))
    record = scanned(root).records[0]
    assert (record.raw_width, record.raw_height, record.orientation) == (48, 64, 6)
    assert record.boxes_xyxy.tolist() == [[0, 0, 24, 64]]


def test_boxes_declared_for_the_picture_as_stored_are_turned_with_it(tmp_path):
    from PIL import Image

    root = voc_set(tmp_path / "set", {"a": [("dog", 10, 5, 30, 15)], "b": [("dog", 10, 5, 30, 15)]})
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "JPEGImages" / "a.jpg").write_bytes(encoded(picture(64, 48), exif=exif))
    (root / "JPEGImages" / "b.jpg").write_bytes(encoded(picture(64, 48, seed=1), exif=exif))
    (root / "Annotations" / "b.xml").write_text(voc_xml([("dog", 10, 5, 30, 15)], size=(48, 64)))
    stored, shown = scanned(root).records
    assert stored.boxes_xyxy.tolist() == [[48 - 15, 10, 48 - 5, 30]]
    assert shown.boxes_xyxy.tolist() == [[10, 5, 30, 15]]


def test_a_nan_in_a_polygon_is_not_passed_over() -> None:
    ((_, box),) = read_yolo_text(b"0 .1 .1 .5 nan .9 .9", "a.txt")
    assert np.isnan(box).all()


def test_half_a_character_in_coco_is_refused_before_anything_is_baked(tmp_path) -> None:
    with pytest.raises(AnnotationError, match="half a character"):
        scanned(one_coco(tmp_path / "set", images=[{"id": 1, "file_name": "\ud800.png"}]))
