"""Listing a folder: complete, sorted, recognised, hashed once; nothing outside the root."""

from __future__ import annotations

import hashlib
import logging
import os
import time

import pytest
from ingest_fakes import coco_json, listed, settings_for, voc_set, voc_xml, write_picture

from ingest.records.list_sources import list_sources
from ingest.sources.files import read_inside
from ingest.sources.hashes import cache_path
from ingest.sources.pairing import pair_by_stem
from warehouse.errors import SourceError
from warehouse.settings import BuildSettings

BOX = ("a", 1, 2, 30, 40)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def aged(root) -> None:
    """Time stamps an hour back: files touched just now are never remembered."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 3600,) * 2)


def test_a_voc_folder_is_listed_sorted_with_the_hashes_of_its_files(tmp_path):
    listing, _ = listed(voc_set(tmp_path / "set", {"b": [BOX], "a": [BOX]}))
    assert listing.format == "voc"
    assert listing.pictures == ("JPEGImages/a.jpg", "JPEGImages/b.jpg")
    assert listing.annotations == ("Annotations/a.xml", "Annotations/b.xml")
    for file in listing.files:
        assert (
            file.sha256 == hashlib.sha256((tmp_path / "set" / file.path).read_bytes()).hexdigest()
        )


def test_the_fingerprint_follows_names_and_contents_and_nothing_else(tmp_path):
    first, _ = listed(voc_set(tmp_path / "one", {"a": [BOX]}))
    second, _ = listed(voc_set(tmp_path / "two", {"a": [BOX]}))
    assert first.fingerprint == second.fingerprint
    (tmp_path / "two" / "Annotations" / "a.xml").write_text(voc_xml([BOX, BOX]))
    assert listed(tmp_path / "two")[0].fingerprint != first.fingerprint


def test_hashes_are_remembered_by_size_time_and_inode_until_rehash(tmp_path):
    root = voc_set(tmp_path / "set", {"a": [BOX]})
    aged(root)
    before = listed(root)[0].fingerprint
    path = root / "Annotations" / "a.xml"
    stamp = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"30", b"31"))
    assert listed(root)[0].fingerprint != before
    os.utime(path, ns=(stamp, stamp))
    assert listed(root)[0].fingerprint == before
    assert listed(root, rehash=True)[0].fingerprint != before


def test_a_file_touched_just_now_is_never_taken_from_the_cache(tmp_path):
    root = voc_set(tmp_path / "set", {"a": [BOX]})
    before = listed(root)[0].fingerprint
    path = root / "Annotations" / "a.xml"
    stamp = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"30", b"31"))
    os.utime(path, ns=(stamp, stamp))
    assert listed(root)[0].fingerprint != before


@pytest.mark.parametrize(
    "content",
    [b"not a database, but long enough to look at" * 50, None],
    ids=["garbage", "a folder"],
)
def test_a_broken_cache_costs_a_warning_and_no_build(tmp_path, caplog, content):
    root = voc_set(tmp_path / "set", {"a": [BOX]})
    aged(root)
    cache_path().parent.mkdir(parents=True)
    cache_path().write_bytes(content) if content else cache_path().mkdir()
    assert len(listed(root)[0].files) == 2
    assert "cache of source hashes cannot be" in caplog.text


def test_progress_counts_every_file_once_with_and_without_the_cache(tmp_path):
    root = voc_set(tmp_path / "set", {"a": [BOX], "b": [BOX]})
    aged(root)
    for _ in range(2):
        seen: list[int] = []
        list_sources(settings_for(root), progress=seen.append)
        assert sum(seen) == 4


def test_two_thousand_known_files_are_listed_in_a_fraction_of_a_second(tmp_path):
    root = tmp_path / "set"
    write_picture(root / "p.jpg")
    for number in range(2000):
        os.link(root / "p.jpg", root / f"{number:04}.jpg")
    aged(root)
    listed(root)
    start = time.perf_counter()
    listing, _ = listed(root)
    assert len(listing.files) == 2001
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.write_text("x"), "is a file, not a folder"),
        (lambda root: root.mkdir(), r"no pictures found: .*\.jpeg .*--build\.input_root"),
        (lambda root: (root.mkdir(), (root / "a.txt").write_text("x")), "found 1 other files"),
    ],
    ids=["no such folder", "a file", "an empty folder", "a folder without pictures"],
)
def test_an_unusable_input_root_is_an_error_that_names_it(tmp_path, make, message):
    make(tmp_path / "root")
    with pytest.raises(SourceError, match=message) as caught:
        listed(tmp_path / "root")
    assert str(tmp_path / "root") in str(caught.value)


def test_no_input_root_names_the_flag():
    with pytest.raises(SourceError, match=r"--build\.input_root"):
        list_sources(BuildSettings())


def test_hidden_files_masks_and_the_output_root_are_no_sources(tmp_path):
    root = tmp_path / "set"
    for name in (
        "a.jpg",
        ".hidden.jpg",
        ".git/b.jpg",
        "__MACOSX/c.jpg",
        "SegmentationClass/d.png",
        "out/e.jpg",
        "sub/F.JPG",
    ):
        write_picture(root / name)
    listing = list_sources(BuildSettings(input_root=str(root), output_root=str(root / "out")))
    assert listing.pictures == ("a.jpg", "sub/F.JPG")


@pytest.mark.parametrize("kind", ["file", "folder", "broken"])
def test_a_link_out_of_the_root_is_refused(tmp_path, kind):
    root = tmp_path / "set"
    write_picture(root / "a.jpg")
    write_picture(tmp_path / "outside" / "b.jpg")
    target = {
        "file": tmp_path / "outside" / "b.jpg",
        "folder": tmp_path / "outside",
        "broken": tmp_path / "nowhere.jpg",
    }[kind]
    (root / "b.jpg").symlink_to(target)
    with pytest.raises(SourceError, match=r"a link leads (out of|nowhere)"):
        listed(root)


def test_a_link_to_a_picture_inside_is_followed(tmp_path):
    write_picture(tmp_path / "set" / "a.jpg")
    (tmp_path / "set" / "b.jpg").symlink_to("a.jpg")
    listing, _ = listed(tmp_path / "set")
    assert listing.sha256_of("a.jpg") == listing.sha256_of("b.jpg")


def test_a_pipe_named_like_a_picture_is_refused_and_not_opened(tmp_path):
    write_picture(tmp_path / "set" / "a.jpg")
    os.mkfifo(tmp_path / "set" / "b.jpg")
    with pytest.raises(SourceError, match=r"not a regular file: b\.jpg"):
        listed(tmp_path / "set")


@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "a/../../b", "a\\..\\b", "a\0b"])
def test_reading_outside_the_root_is_refused(tmp_path, path):
    with pytest.raises(SourceError, match="leads out of the input folder"):
        read_inside(tmp_path, path, limit=100)


def test_reading_more_than_the_limit_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(SourceError, match="expected at most 4 bytes, found 5 bytes"):
        read_inside(tmp_path, "a", limit=4)


def yolo(root) -> None:
    write_picture(root / "images" / "train" / "a.jpg")
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "a.txt").write_text("0 .5 .5 .1 .1\n")


def coco(root) -> None:
    write_picture(root / "train2017" / "a.jpg")
    coco_json(root / "annotations" / "instances_train2017.json", [], [], [])
    coco_json(root / "annotations" / "captions_train2017.json", [], [], [])


RECOGNISED = {
    "voc": lambda root: voc_set(root, {"a": [BOX]}),
    "voc beside the pictures": lambda root: (
        write_picture(root / "a.jpg"),
        (root / "a.xml").write_text(voc_xml([BOX])),
    ),
    "yolo": yolo,
    "coco": coco,
    "folder": lambda root: (
        write_picture(root / "a.jpg"),
        (root / "README.txt").write_text("hello"),
        (root / "info.json").write_text("{}"),
    ),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_auto_recognises_the_format_and_says_so(tmp_path, caplog, name):
    caplog.set_level(logging.INFO)
    RECOGNISED[name](tmp_path / "set")
    listing, _ = listed(tmp_path / "set")
    assert listing.format == name.split()[0]
    assert listing.format in caplog.text
    assert "annotations/captions_train2017.json" not in listing.annotations


def test_two_formats_at_once_are_ambiguous_until_one_is_chosen(tmp_path):
    yolo(tmp_path / "set")
    voc_set(tmp_path / "set", {"b": [BOX]})
    with pytest.raises(
        SourceError,
        match=r"more than one format: .*voc and yolo; choose one with --build\.format voc",
    ):
        listed(tmp_path / "set")
    assert listed(tmp_path / "set", format="yolo")[0].annotations == ("labels/train/a.txt",)


@pytest.mark.parametrize("kind", ["voc", "coco", "yolo"])
def test_a_format_without_any_annotation_is_an_error(tmp_path, kind):
    write_picture(tmp_path / "set" / "a.jpg")
    with pytest.raises(SourceError, match=f"no {kind} annotations found"):
        listed(tmp_path / "set", format=kind)


@pytest.mark.parametrize(
    ("picture", "annotation"),
    [
        ("a.jpg", "a.xml"),
        ("a.jpg", "Annotations/a.xml"),
        ("JPEGImages/a.jpg", "Annotations/a.xml"),
        ("images/x/a.jpg", "labels/x/a.xml"),
        ("train/images/a.jpg", "train/labels/a.xml"),
        ("train/a.jpg", "labels/train/a.xml"),
        ("images/train/a.jpg", "Annotations/a.xml"),
        ("train/a.jpg", "train/xml/a.xml"),
        ("a.b.c.jpg", "a.b.c.xml"),
    ],
)
def test_annotations_are_found_beside_and_in_sibling_folders(picture, annotation):
    assert pair_by_stem([picture], [annotation]).annotation_of == {picture: annotation}


@pytest.mark.parametrize(
    ("picture", "annotation"),
    [("a.jpg", "b.xml"), ("train/a.jpg", "labels/val/a.xml"), ("x/a.jpg", "y/a.xml")],
)
def test_annotations_of_other_pictures_are_left_over(picture, annotation):
    pairs = pair_by_stem([picture], [annotation])
    assert not pairs.annotation_of
    assert pairs.orphans == (annotation,)


def test_an_annotation_belongs_to_one_picture():
    pairs = pair_by_stem(["a.jpg", "a.png"], ["a.xml"])
    assert pairs.annotation_of == {"a.jpg": "a.xml"}
    assert pairs.ambiguous == {"a.png": "a.xml"}
