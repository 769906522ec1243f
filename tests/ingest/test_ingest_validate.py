"""found = kept + rejected, whatever the sources are.

Thresholds name counts, offenders and the flag.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_fakes import encoded, listed, picture, scanned, voc_set, voc_xml, write_picture

from ingest.pictures.thresholds import check_thresholds
from ingest.pictures.validate import scan
from warehouse.errors import AnnotationError, PictureError, ThresholdError
from warehouse.format.schema import CLIPPED
from warehouse.settings import BuildSettings

BOX = ("dog", 4, 6, 30, 40)
GOOD = {f"p{number:02}": [BOX] for number in range(40)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(root, **options) -> str:
    with pytest.raises(ThresholdError) as caught:
        check_thresholds(scanned(root, **options), BuildSettings(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def passes(root, **options):
    result = scanned(root, **options)
    check_thresholds(result, BuildSettings(**options))
    assert result.found == result.kept + result.rejected_pictures
    return result


def test_a_clean_folder_passes_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    result = passes(voc_set(tmp_path / "set", GOOD))
    assert result.counts["boxes"] == result.kept == 40
    assert not caplog.text
    assert not result.warnings


@pytest.mark.parametrize(
    "content",
    [b"", b"no picture", encoded(picture(300, 300))[:5000]],
    ids=["empty_file", "unreadable", "truncated"],
)
def test_a_bad_picture_counts_as_invalid_and_is_named_with_the_flag(
    tmp_path, content, caplog, request
):
    root = voc_set(tmp_path / "set", GOOD)
    (root / "JPEGImages" / "p03.jpg").write_bytes(content)
    message = refused(root)
    assert f"JPEGImages/p03.jpg ({request.node.callspec.id}" in message
    assert "--build.max_invalid 1" in message
    result = passes(root, max_invalid=1)
    assert result.kept == 39
    assert "p03.jpg" in caplog.text


def test_invalid_and_missing_sources_are_told_at_once(tmp_path):
    root = voc_set(tmp_path / "set", GOOD)
    (root / "JPEGImages" / "p03.jpg").write_bytes(b"")
    (root / "Annotations" / "p07.xml").unlink()
    message = refused(root)
    assert "JPEGImages/p03.jpg (empty_file" in message
    assert "--build.max_invalid 1; and too many missing sources" in message
    assert "p07.jpg (missing_annotation" in message
    assert "--build.max_missing 1" in message
    assert passes(root, max_invalid=1, max_missing=1).kept == 38


def test_a_picture_all_of_whose_boxes_are_bad_is_invalid_and_its_boxes_are_listed(tmp_path):
    root = voc_set(
        tmp_path / "set", {**GOOD, "bad": [("dog", 5, 5, 5, 9), ("dog", "nan", 1, 2, 3)]}
    )
    assert "JPEGImages/bad.jpg (no_valid_boxes: all of 2 boxes were bad)" in refused(root)
    lines = [(item.kind, item.reason) for item in passes(root, max_invalid=1).rejected]
    assert lines == [("box", "nan"), ("box", "zero_area"), ("picture", "no_valid_boxes")]


def test_one_bad_box_among_good_ones_is_dropped_counted_and_listed(tmp_path):
    root = voc_set(
        tmp_path / "set", {**GOOD, "some": [BOX, ("dog", 30, 5, 10, 9), ("dog", -20, 5, 30, 9)]}
    )
    result = passes(root)
    record = next(record for record in result.records if "some" in record.source)
    assert record.counts == {"reversed": 1, "clipped": 1}
    assert record.flags.tolist() == [0, CLIPPED]
    assert result.rejected[0].detail == "box 1 dog: 30, 5, 10, 9"
    assert "1 boxes left out (1 reversed)" in result.warnings[0]


def test_a_picture_of_nothing_but_tiny_boxes_is_empty_and_not_invalid(tmp_path):
    root = voc_set(tmp_path / "set", {**GOOD, "tiny": [("dog", 5, 5, 5.1, 9)]})
    result = passes(root)
    assert (result.counts["invalid"], result.counts["empty"], result.counts["tiny"]) == (0, 1, 1)


def test_missing_annotations_and_missing_pictures_count_together(tmp_path):
    root = voc_set(tmp_path / "set", GOOD)
    (root / "Annotations" / "p01.xml").unlink()
    (root / "JPEGImages" / "p02.jpg").unlink()
    message = refused(root)
    assert "1 without annotation, 1 annotations without picture" in message
    assert "--build.max_missing 2" in message
    assert "missing_is_empty" in message
    result = passes(root, max_missing=2)
    assert (result.found, result.kept) == (39, 38)
    assert "--build.max_missing 2" in refused(root, max_missing=1)


def test_missing_is_empty_makes_background_of_pictures_only(tmp_path):
    root = voc_set(tmp_path / "set", GOOD)
    (root / "Annotations" / "p01.xml").unlink()
    result = passes(root, missing_is_empty=True)
    assert (result.kept, result.counts["background"], result.counts["empty"]) == (40, 1, 1)


def test_too_many_empty_pictures_name_the_ratio_that_would_do(tmp_path):
    root = voc_set(tmp_path / "set", {**GOOD, **{f"e{number}": [] for number in range(3)}})
    message = refused(root)
    assert "3 of 43 kept pictures have no boxes" in message
    assert "--build.max_empty_ratio 0.07," in message
    assert passes(root, max_empty_ratio=0.07).kept == 43
    skipped = passes(root, skip_empty=True)
    assert (skipped.kept, skipped.counts["skipped"], skipped.counts["invalid"]) == (40, 3, 0)


def test_a_plain_folder_has_neither_missing_nor_empty_pictures(tmp_path):
    for number in range(4):
        write_picture(tmp_path / "set" / f"{number}.jpg", seed=number)
    result = passes(tmp_path / "set")
    assert (result.kept, result.class_names) == (4, ())


def test_nothing_left_is_refused_whatever_is_allowed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jpg").write_bytes(b"")
    assert "no picture is left" in refused(tmp_path / "set", max_invalid=9)


def test_fixed_classes_rename_nothing_and_refuse_others(tmp_path):
    root = voc_set(tmp_path / "set", {**GOOD, "cat": [("cat", 1, 1, 20, 20), BOX]})
    result = passes(root, classes=["bird", "dog"])
    assert result.class_names == ("bird", "dog")
    assert {int(label) for record in result.records for label in record.labels} == {1}
    assert [(item.kind, item.reason) for item in result.rejected] == [("box", "unknown_class")]


def test_too_many_boxes_name_the_fullest_picture_and_the_number_that_serves_all(tmp_path):
    many = [("dog", x, 2, x + 10, 20) for x in range(20)]
    root = voc_set(tmp_path / "set", {**GOOD, "full": many[:5], "fuller": many[:9]})
    with pytest.raises(
        AnnotationError,
        match=(
            r"in 2 pictures: JPEGImages/fuller\.jpg; expected at most 4, found 9; use "
            r"--build\.max_boxes 9"
        ),
    ):
        scanned(root, max_boxes=4)
    assert passes(root, max_boxes=9).kept == 42


def test_truncation_keeps_the_largest_in_order_and_lists_the_rest(tmp_path):
    sizes = [10, 30, 5, 20]
    root = voc_set(tmp_path / "set", {"a": [("dog", 0, 0, size, size) for size in sizes]})
    result = passes(root, max_boxes=2, too_many_boxes="truncate")
    assert result.records[0].boxes_xyxy[:, 2].tolist() == [30, 20]
    assert [item.detail for item in result.rejected] == [
        "box 0 dog: 0, 0, 10, 10",
        "box 2 dog: 0, 0, 5, 5",
    ]
    assert {item.reason for item in result.rejected} == {"over_max_boxes"}


def test_two_pictures_of_one_stem_do_not_share_an_annotation(tmp_path):
    root = voc_set(tmp_path / "set", GOOD)
    write_picture(root / "JPEGImages" / "p01.png")
    assert "JPEGImages/p01.png (ambiguous_annotation" in refused(root)


def test_what_is_odd_but_accepted_is_said(tmp_path):
    root = voc_set(tmp_path / "set", GOOD)
    (root / "JPEGImages" / "p01.jpg").write_bytes(encoded(picture(), "PNG"))
    (root / "Annotations" / "p02.xml").write_text(voc_xml([BOX], size=(999, 999)))
    text = " ".join(passes(root).warnings)
    assert "declare another size" in text
    assert "not of the kind that their extension says" in text


def test_a_picture_that_failed_while_being_baked_is_rejected_when_planned_again(tmp_path):
    listing, chosen = listed(voc_set(tmp_path / "set", GOOD))
    failed = PictureError("truncated", where="JPEGImages/p05.jpg", found="premature end")
    result = scan(listing, chosen, unreadable={"JPEGImages/p05.jpg": failed})
    assert (result.kept, result.counts["invalid"]) == (39, 1)
    assert (result.rejected[0].reason, result.rejected[0].detail) == ("truncated", "premature end")


def test_a_scan_is_the_same_for_any_number_of_workers(tmp_path):
    listing, chosen = listed(voc_set(tmp_path / "set", {**GOOD, "bad": [("dog", 5, 5, 5, 9)]}))
    one, four = scan(listing, chosen, workers=1), scan(listing, chosen, workers=4)
    assert (one.rejected, one.counts, one.class_names) == (
        four.rejected,
        four.counts,
        four.class_names,
    )
    for a, b in zip(one.records, four.records, strict=True):
        assert (a.source, a.split, a.group) == (b.source, b.split, b.group)
        np.testing.assert_array_equal(a.boxes_xyxy, b.boxes_xyxy)


FATES = st.lists(
    st.sampled_from(
        ["good", "empty", "no annotation", "no picture", "bad picture", "bad xml", "bad box"]
    ),
    min_size=1,
    max_size=12,
)


@given(FATES, st.booleans(), st.booleans())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_found_is_kept_plus_rejected_for_any_mixture(
    tmp_path_factory, fates, skip_empty, missing_is_empty
):
    root = tmp_path_factory.mktemp("mix") / "set"
    write_picture(root / "JPEGImages" / "first.jpg", seed=99)
    (root / "Annotations").mkdir()
    (root / "Annotations" / "first.xml").write_text(voc_xml([BOX]))
    for at, fate in enumerate(fates):
        if fate != "no picture":
            write_picture(root / "JPEGImages" / f"{at}.jpg", seed=at)
        if fate == "bad picture":
            (root / "JPEGImages" / f"{at}.jpg").write_bytes(b"\xff\xd8\xff\xe0")
        if fate != "no annotation":
            boxes = {"empty": [], "bad box": [("dog", 9, 9, 1, 1)]}.get(fate, [BOX])
            (root / "Annotations" / f"{at}.xml").write_text(
                "<oops" if fate == "bad xml" else voc_xml(boxes)
            )
    result = scanned(root, skip_empty=skip_empty, missing_is_empty=missing_is_empty)
    count = fates.count
    assert (
        result.found
        == 1 + len(fates) - count("no picture")
        == result.kept + result.rejected_pictures
    )
    assert result.counts["invalid"] == count("bad picture") + count("bad xml") + count("bad box")
    assert result.counts["missing_pictures"] == count("no picture")
    absent = count("no annotation")
    assert result.counts["missing_annotations"] == (0 if missing_is_empty else absent)
    assert result.counts["skipped"] == (
        count("empty") + (absent if missing_is_empty else 0) if skip_empty else 0
    )
    assert (
        len(
            {item.path for item in result.rejected if item.kind == "picture"}
            | {record.source for record in result.records}
        )
        == result.found
    )
