"""Class folders and pictures with masks, from files to a published version."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from folder_fakes import baked, class_folders, masked
from ingest_fakes import DATA
from PIL import Image

from ingest.jobs import open_job
from ingest.rasters.settings import RasterSettings
from ingest.sources.pairing import is_mask, pairing_key
from ingest.sources.splits import assign_splits
from ingest.synthetic.make import make_sample
from ingest.synthetic.settings import SampleSettings
from warehouse.errors import PictureError, ThresholdError
from warehouse.inspect.verify import verify
from warehouse.settings import BuildSettings


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_picture_s_class_is_its_folder_and_numbers_are_sorted_as_numbers(tmp_path):
    class_folders(tmp_path / "in")
    version = baked(tmp_path / "in", tmp_path / "out", format="classes")
    assert version.manifest.class_names == ["9", "10", "cat"]
    assert verify(version)[1] == []
    rows = version.table("samples.parquet").to_pylist()
    for name in version.splits:
        sources = [row["source"] for row in rows if row["split"] == name]
        target = version.split(name).array("target")[:]
        assert target.dtype == np.int16
        assert [version.manifest.class_names[at] for at in target] == [
            source.split("/")[0] for source in sources
        ]
    assert version.manifest.summary["all"]["per_class"] == {"9": 10, "10": 10, "cat": 10}


def test_every_class_is_shared_out_like_the_whole(tmp_path):
    class_folders(tmp_path / "in")
    version = baked(tmp_path / "in", tmp_path / "out", format="classes")
    for name, each in {"train": 8, "val": 1, "test": 1}.items():
        assert np.bincount(version.split(name).array("target")[:]).tolist() == [each] * 3


def test_copies_of_a_picture_in_two_classes_stay_in_one_split():
    sources = [f"{name}/{at}.png" for name in "ab" for at in range(10)]
    places = assign_splits(
        sources, [f"{at % 10}" for at in range(20)], BuildSettings(), [at // 10 for at in range(20)]
    )
    assert places.splits[:10] == places.splits[10:]


def test_given_split_folders_around_classes_are_kept(tmp_path):
    class_folders(tmp_path / "in" / "train", each=3)
    class_folders(tmp_path / "in" / "val", each=2)
    (tmp_path / "in" / "val" / "9" / "0.png").write_bytes(
        (tmp_path / "in" / "train" / "9" / "0.png").read_bytes()
    )
    version = baked(tmp_path / "in", tmp_path / "out", format="classes")
    assert {name: len(version.split(name)) for name in version.splits} == {"train": 9, "val": 6}
    assert version.manifest.class_names == ["9", "10", "cat"]


@pytest.mark.parametrize(
    ("where", "options"),
    [("stray.png", {}), ("cat/x.png", {"classes": ["9", "10"]})],
    ids=["no folder", "other class"],
)
def test_a_picture_without_a_class_is_refused_by_name(tmp_path, where, options):
    class_folders(tmp_path / "in", names=("9", "10"))
    (tmp_path / "in" / where).parent.mkdir(exist_ok=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / where)
    with pytest.raises(ThresholdError, match=where):
        baked(tmp_path / "in", tmp_path / "out", format="classes", **options)


def test_masks_follow_their_pictures_through_the_letterbox(tmp_path):
    masked(tmp_path / "in")
    version = baked(
        tmp_path / "in",
        tmp_path / "out",
        format="masks",
        mask_values={0: 0, 255: 3},
        target_size=(64, 80),
    )
    assert verify(version)[1] == []
    rows = version.table("samples.parquet").to_pylist()
    for name in version.splits:
        mask = version.split(name).array("mask")[:]
        for at, row in enumerate(row for row in rows if row["split"] == name):
            truth = np.asarray(
                Image.open(tmp_path / "in" / row["source"].replace("image", "label"))
            )
            # 40 x 24 doubles to 80 x 48 and stands in the middle of 64 rows.
            assert (
                mask[at, 8:56] == np.where(truth == 255, 3, 0).repeat(2, axis=0).repeat(2, axis=1)
            ).all()
            assert (mask[at, :8] == 255).all()
            assert (mask[at, 56:] == 255).all()


@pytest.mark.parametrize(("values", "reason"), [((0, 1), "mask_values"), ((7, 255), "mask_values")])
def test_values_nobody_declared_are_refused(tmp_path, values, reason):
    masked(tmp_path / "in", values)
    with pytest.raises(ThresholdError, match=reason):
        baked(tmp_path / "in", tmp_path / "out", format="masks")


def test_a_mask_of_another_size_a_missing_and_a_broken_one_are_refused(tmp_path):
    masked(tmp_path / "in")
    Image.new("L", (40, 23)).save(tmp_path / "in" / "label" / "0.png")
    (tmp_path / "in" / "label" / "1.png").write_bytes(b"no picture")
    (tmp_path / "in" / "label" / "2.png").unlink()
    version = baked(tmp_path / "in", tmp_path / "out", format="masks", max_invalid=3)
    lines = (version.folder / "rejected.jsonl").read_text()
    assert version.manifest.kept == 7
    assert all(reason in lines for reason in ("mask_size", "mask_unreadable", "no_mask"))


def test_masks_are_told_from_pictures_by_name():
    pairs = [
        ("images/train/a.jpg", "masks/train/a.png"),
        ("a.jpg", "a_mask.png"),
        ("x/image/3.png", "x/label/3.png"),
        ("b.png", "gt/b.png"),
    ]
    for picture, mask in pairs:
        assert not is_mask(picture)
        assert is_mask(mask)
        assert pairing_key(picture) == pairing_key(mask)


def test_sign_digits_and_membrane_are_read_whole(tmp_path):
    if not DATA.is_dir():
        pytest.skip("the folder of real data (../shared/data) is not here")
    signs = baked(DATA / "sign_digits", tmp_path / "signs", format="classes")
    assert [
        np.bincount(signs.split(name).array("target")[:]).tolist() for name in signs.splits
    ] == [[24] * 10, [3] * 10, [3] * 10]
    cells = baked(DATA / "membrane", tmp_path / "cells", format="masks", target_size=(512, 512))
    row = cells.table("samples.parquet").to_pylist()[0]
    truth = cv2.imread(
        str(DATA / "membrane" / row["source"].replace("image", "label")), cv2.IMREAD_UNCHANGED
    )
    assert (cells.split(row["split"]).array("mask")[0] == (truth == 255)).all()


def test_a_mask_s_error_names_picture_and_mask(tmp_path):
    masked(tmp_path / "in", (0, 1))
    settings = BuildSettings(
        input_root=str(tmp_path / "in"),
        output_root=str(tmp_path / "out"),
        format="masks",
        target_size=(32, 32),
    )
    job = open_job(settings, RasterSettings())
    plan = job.plan({})
    with pytest.raises(PictureError, match=r"image/\d\.png.*label/\d\.png"):
        job.loader(plan)(plan.splits[0].payloads[0])


@pytest.mark.parametrize(("kind", "array"), [("classes", "target"), ("masks", "mask")])
def test_drawn_samples_of_both_kinds_build(tmp_path, kind, array):
    for name in ("one", "again"):
        make_sample(SampleSettings(kind=kind, count=12, size=(64, 96), output=str(tmp_path / name)))
    one, again = (
        baked(tmp_path / name, tmp_path / f"out_{name}", format=kind) for name in ("one", "again")
    )
    assert one.manifest.digest == again.manifest.digest
    values = np.concatenate([one.split(name).array(array)[:].reshape(-1) for name in one.splits])
    assert set(np.unique(values).tolist()) == ({0, 1, 2} if kind == "classes" else {0, 1, 255})
