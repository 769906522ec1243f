"""segment_patches from pictures to stitched masks.

Figures anew from the files, what it refuses and how.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from segment_fakes import OVERLAP, SIZE, Outcome, digest, files, pixels_of, queue_rows, results

from ingest.pictures.large.survey import list_pictures, survey
from segmentation.patches import patch_boxes
from segmentation.stitch import axis_weights, open_stitched
from segmentation.unet import restore_unet
from utils.loader import ChunkLoader
from utils.training.checkpoint import load_checkpoint, save_checkpoint
from warehouse import Warehouse
from warehouse.settings import BuildSettings

pytest_plugins = ["segment_fixtures"]


def test_a_run_ends_with_a_mask_for_every_picture_and_figures_that_hold(
    pictures: Path, finished: Path, segment: Callable[..., Outcome]
) -> None:
    attempts = [row["attempts"] for row in queue_rows(finished)]
    code, result, last = segment(
        pictures, finished
    )  # everything is there already: nothing is done again
    assert code == 0
    assert result is not None
    assert last.endswith(f"open {results(finished) / 'index.html'} in a browser")
    assert [row["attempts"] for row in queue_rows(finished)] == attempts == [1] * len(attempts)
    assert {row["samples"] for row in queue_rows(finished)} <= set(range(1, 17))
    assert result["masks"] == 7
    assert result["jobs_left"] == 0
    assert result["epochs"] == 3
    assert result["peak_memory_gb"] > 0.1
    said = json.loads((results(finished) / "scores.json").read_text())
    assert said["scores"] == result["scores"]
    assert result["dice"] == result["scores"]["test"]["dice"]
    assert {picture["split"] for picture in said["pictures"]} == {"train", "val", "test", "predict"}
    for split in ("train", "val", "test"):
        pairs = []
        for picture in (one for one in said["pictures"] if one["split"] == split):
            mask = pixels_of(results(finished) / picture["mask"])
            truth = pixels_of(
                pictures / "masks" / f"{picture['name'].split('/')[1].split('.')[0]}.png"
            )
            assert mask.shape == truth.shape == (70, 90)
            assert set(np.unique(mask)) <= {0, 255}, "in the values of the mask files"
            pairs.append((mask.ravel(), truth.ravel()))
        mask, truth = (np.concatenate(part) for part in zip(*pairs, strict=True))
        for index, value in enumerate((0, 255)):
            both = ((mask == value) & (truth == value)).sum()
            dice = 2 * both / ((mask == value).sum() + (truth == value).sum())
            assert result["scores"][split]["dice"][str(index)] == pytest.approx(dice)
    free = next(picture for picture in said["pictures"] if picture["split"] == "predict")
    assert free["scores"] is None
    assert pixels_of(results(finished) / free["mask"]).shape == (100, 64)
    assert "truth" not in open_stitched(results(finished) / "stitched" / "images_free.zarr")
    assert (
        "images/free.png (predict, 64 x 100): image, prediction. no truth"
        in (results(finished) / "index.html").read_text()
    )


def test_a_stitched_picture_is_the_model_on_every_patch_merged_by_the_weights(
    pictures: Path, finished: Path
) -> None:
    """The way from a file to its probabilities, gone again without store, jobs or bands."""
    picture = pixels_of(pictures / "images" / "free.png")
    model = restore_unet(load_checkpoint(finished / "checkpoint"))
    height, width = picture.shape[:2]
    total = np.zeros((2, height, width))
    along = [
        dict(zip(offsets, axis_weights(offsets, SIZE, side, OVERLAP), strict=True))
        for offsets, side in (([0, 24, 48, 68], height), ([0, 24, 32], width))
    ]
    for _, _, (x1, y1, x2, y2) in patch_boxes(width, height, SIZE, OVERLAP):
        patch = torch.from_numpy(picture[y1:y2, x1:x2].transpose(2, 0, 1).copy())[None]
        with torch.inference_mode():
            said = model(patch).softmax(dim=1)[0].numpy()
        total[:, y1:y2, x1:x2] += said * along[0][y1][:, None] * along[1][x1]
    group = open_stitched(results(finished) / "stitched" / "images_free.zarr")
    np.testing.assert_allclose(group["probability"][:], total, rtol=0, atol=2e-3)
    clear = np.abs(total[1] - total[0]) > 5e-3
    np.testing.assert_array_equal(group["label"][:][clear], total.argmax(axis=0)[clear])
    np.testing.assert_allclose(group["probability"][:].astype(float).sum(axis=0), 1, atol=2e-3)


def test_another_blend_is_another_folder_and_nothing_is_predicted_again(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    code, result, _ = segment(pictures, tmp_path / "out", blend="constant")
    assert code == 0
    assert result is not None
    assert result["path"].endswith("-constant")
    assert {row["attempts"] for row in queue_rows(tmp_path / "out")} == {1}
    assert files(results(tmp_path / "out")) == files(results(finished)), (
        "the first result is left alone"
    )


def test_other_patches_are_a_second_manifest_and_need_an_output_of_their_own(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    code, _, last = segment(pictures, tmp_path / "out", overlap=16)
    assert code == 1
    assert "--segment.output" in last
    names = sorted(path.name for path in (tmp_path / "out").glob("patch_manifest*"))
    assert names == [f"patch_manifest.v00{n}.{kind}" for n in (1, 2) for kind in ("csv", "parquet")]
    first, second = (
        pq.read_table(tmp_path / "out" / f"patch_manifest.v00{n}.parquet") for n in (1, 2)
    )
    assert len(second) > len(first)
    assert {
        "patch_id",
        "parent",
        "x1",
        "y1",
        "x2",
        "y2",
        "offset_x",
        "offset_y",
        "features_path",
    } <= set(first.column_names)
    code, result, _ = segment(
        pictures, tmp_path / "out", overlap=16, checkpoint=finished / "checkpoint"
    )
    assert code == 0, "a finished checkpoint takes any patches it fits"
    assert result is not None
    assert result["masks"] == 7


def test_a_changed_model_is_refused_by_name(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    code, _, last = segment(pictures, tmp_path / "out", width=8)
    assert code == 1
    assert "width; expected 8, found 4" in last
    assert "choose another --segment.output" in last


def of_another_kind(folder: Path) -> None:
    save_checkpoint(folder, {"average.weight": torch.ones(2)}, {"model": {"kind": "vqvae"}})


def torn(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-10])


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("spoil", "more", "words"),
    [
        (of_another_kind, {}, "not of a U-Net"),
        (torn, {}, "checkpoint"),
        (gone, {}, "checkpoint"),
        (None, {"channels": 1}, "other channels.*expected 1, found 3.*segment.checkpoint"),
        (None, {"mask_values": '{"0": 0, "255": 2}'}, "other classes.*expected 3, found 2"),
        (
            None,
            {"patch_size": 33, "stem": 1, "levels": 1},
            "does not take patches of this size.*multiple of 4, found 33 x 33",
        ),
    ],
    ids=["another kind", "torn", "gone", "channels", "classes", "patch size"],
)
def test_a_checkpoint_that_does_not_fit_is_a_line_with_a_remedy(
    pictures: Path,
    finished: Path,
    tmp_path: Path,
    segment: Callable[..., Outcome],
    spoil: Any,
    more: dict[str, Any],
    words: str,
) -> None:
    shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(finished / "patches", tmp_path / "out" / "patches")
    if spoil is not None:
        spoil(tmp_path / "checkpoint")
    code, result, last = segment(
        pictures, tmp_path / "out", checkpoint=tmp_path / "checkpoint", **more
    )
    assert (code, result) == (1, None)
    assert last.startswith("error: ")
    assert re.search(words, last), last
    assert not (tmp_path / "out" / "jobs").exists()


def test_training_that_ran_out_of_minutes_predicts_nothing_and_goes_on(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    code, result, last = segment(pictures, tmp_path / "out", max_minutes=1e-6)
    assert code == 0
    assert result is not None
    assert (result["finished"], result["masks"], result["dice"]) == (False, 0, None)
    assert last == "training is not finished; next: run the same command again"
    assert not (tmp_path / "out" / "probabilities").exists()
    assert segment(pictures, tmp_path / "out")[1]["finished"]
    assert digest(tmp_path / "out") == digest(finished)


def test_training_holds_neither_the_patches_in_memory_nor_all_it_evaluates(
    pictures: Path, tmp_path: Path, segment: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`store: auto` would decode a split into memory while it fits.

    A picture of 20,000 x 20,000 would be there twice.
    """
    stores: list[tuple[str, str]] = []

    class Noted(ChunkLoader):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            stores.append((self.split.name, self.store))

    monkeypatch.setattr("segmentation.training.ChunkLoader", Noted)
    assert segment(pictures, tmp_path / "out", epochs=1, limit_batches=1)[0] == 0
    assert stores == [("train", "pread"), ("val", "pread")]


def test_grey_pictures_without_masks_are_predicted_by_a_model_of_colour(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    (tmp_path / "in").mkdir()
    for name, side in (("a.png", 33), ("b.png", 64)):
        Image.fromarray(
            np.random.default_rng(side).integers(0, 256, (side, side + 7), np.uint8)
        ).save(tmp_path / "in" / name)
    code, result, last = segment(tmp_path / "in", tmp_path / "out")
    assert code == 1
    assert "no image with a mask is in the split train" in last
    code, result, _ = segment(
        tmp_path / "in", tmp_path / "out", checkpoint=finished / "checkpoint", channels=3
    )
    assert code == 0
    assert result is not None
    assert (result["masks"], result["scores"], result["dice"]) == (2, {}, None)
    assert pixels_of(results(tmp_path / "out") / "masks" / "a.png").shape == (33, 40)


def test_a_damaged_chunk_of_probabilities_is_never_stitched(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(results(tmp_path / "out"))
    path = next(
        (tmp_path / "out" / "probabilities").glob("v*/warehouse.zarr/train/probability/c/0/0/0/0")
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    code, _, last = segment(pictures, tmp_path / "out")
    assert code == 1
    assert "train/probability/c/0/0/0/0" in last


def test_a_mask_whose_picture_is_missing_is_said(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    shutil.copytree(pictures, tmp_path / "in")
    (tmp_path / "in" / "images" / "scene_00001.png").rename(
        tmp_path / "in" / "images" / "scene_1.png"
    )
    code, _, _ = segment(
        tmp_path / "in", tmp_path / "out", checkpoint=finished / "checkpoint", jobs=1
    )
    assert code == 0
    lines = Warehouse.open(tmp_path / "out" / "patches").manifest.warnings
    assert any(
        "1 masks have no picture of their name, such as masks/scene_00001.png" in line
        for line in lines
    )


def test_membrane_is_fifteen_parents_of_nine_patches(shared_data: Path, tmp_path: Path) -> None:
    build = BuildSettings(
        input_root=str(shared_data / "membrane"),
        format="masks",
        output_root=str(tmp_path),
        group_pattern=None,
    )
    found = survey(list_pictures(build), build, least=256, unreadable={})
    assert len(found.parents) == 15
    assert found.grey
    assert not found.rejected
    assert all(parent.mask == parent.source.replace("image/", "label/") for parent in found.parents)
    assert {len(patch_boxes(parent.width, parent.height, 256, 64)) for parent in found.parents} == {
        9
    }
