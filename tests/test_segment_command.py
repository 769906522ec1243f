"""segment_patches from pictures to stitched masks: figures anew from the files, killed and resumed, what it refuses and how."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from features import mask_jobs, mask_results
from features.patches import patch_boxes
from features.queue import JobQueue
from features.segment import SegmentTask
from features.stitch import axis_weights, open_stitched
from features.unet import restore_unet
from ingest.patches import list_pictures, survey
from ingest.synthetic import SampleSettings, make_sample
from scripts import segment_patches
from utils.argyaml import run
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.loader import ChunkLoader
from warehouse import Warehouse, durable
from warehouse.schema import BuildSettings

Outcome = tuple[int, dict[str, Any] | None, str]
SIZE, OVERLAP = 32, 8
SMALL = {"patch_size": SIZE, "overlap": OVERLAP, "width": 4, "levels": 2, "epochs": 3, "warmup_steps": 3, "device": "cpu"}
SECTIONS = {"segment": "features.segment:SegmentSettings", "loader": "utils.loader:LoaderSettings",
            "experiments": "utils.experiments:ExperimentSettings"}  # fmt: skip


def flags(folder: Path, output: Path, **more: Any) -> list[str]:
    values = {"input_root": folder, "output": output, **SMALL, **more}
    return [text for key, value in values.items() for text in (f"--segment.{key}", str(value))]


def call(*argv: str) -> int:
    return run(segment_patches.main, segment_patches.__doc__, argv=argv, **SECTIONS)


@pytest.fixture
def segment(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """The command as its command line would run it: (exit code, result, last line of stderr)."""
    former = signal.getsignal(signal.SIGTERM)

    def once(folder: Path, output: Path, **more: Any) -> Outcome:
        capsys.readouterr()
        code = call(*flags(folder, output, **more))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        lines = out.strip().splitlines()
        return code, json.loads(lines[-1]) if lines else None, err.strip().splitlines()[-1]

    yield once
    signal.signal(signal.SIGTERM, former)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six colour pictures of 70 x 90 with masks, of sides that are no multiple of anything, and one of 100 x 64 without a mask."""
    root = tmp_path_factory.mktemp("pictures") / "in"
    make_sample(SampleSettings(kind="masks", count=6, size=(70, 90), output=str(root)))
    make_sample(SampleSettings(kind="masks", count=1, size=(100, 64), seed=5, output=str(root.parent / "more")))
    shutil.copy(root.parent / "more" / "images" / "scene_00000.png", root / "images" / "free.png")
    return root


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert call(*flags(pictures, output)) == 0
    return output


def results(output: Path) -> Path:
    (folder,) = (path for path in output.glob("v*-ramp"))
    return folder


def digest(output: Path) -> str:
    return Warehouse.open(output / "probabilities").manifest.digest


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pixels_of(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def queue_rows(output: Path) -> list[dict[str, Any]]:
    (path,) = (output / "jobs").glob("*/jobs.db")
    with JobQueue(path) as queue:
        return queue.rows()


def test_a_run_ends_with_a_mask_for_every_picture_and_figures_that_hold(
    pictures: Path, finished: Path, segment: Callable[..., Outcome]
) -> None:
    attempts = [row["attempts"] for row in queue_rows(finished)]
    code, result, last = segment(pictures, finished)  # everything is there already: nothing is done again
    assert code == 0
    assert result is not None
    assert last.endswith(f"look at {results(finished) / 'index.html'}")
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
            truth = pixels_of(pictures / "masks" / f"{picture['name'].split('/')[1].split('.')[0]}.png")
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
    assert "images/free.png (predict, 64 x 100): picture, prediction. no truth" in (results(finished) / "index.html").read_text()


def test_a_stitched_picture_is_the_model_on_every_patch_merged_by_the_weights(pictures: Path, finished: Path) -> None:
    """The way from a file to its probabilities, gone again without store, jobs or bands."""
    picture = pixels_of(pictures / "images" / "free.png")
    model = restore_unet(load_checkpoint(finished / "checkpoint"))
    height, width = picture.shape[:2]
    total = np.zeros((2, height, width))
    along = [dict(zip(offsets, axis_weights(offsets, SIZE, side, OVERLAP), strict=True))
             for offsets, side in (([0, 24, 48, 68], height), ([0, 24, 32], width))]  # fmt: skip
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


def die(argv: list[str], where: str, number: int, threads: int) -> None:
    """The command, killed as by `kill -9` within training step or prediction job `number` of this process."""
    # Sums depend on how many threads share them, and what other tests left in the environment decides over a new process's.
    torch.set_num_threads(threads)
    kind, name = (SegmentTask, "loss") if where == "train" else (mask_jobs.ProbabilityLoader, "__call__")
    real, calls = getattr(kind, name), iter(range(10_000))

    def fatal(self: Any, *args: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    setattr(kind, name, fatal)
    call(*argv)


def test_killed_twice_in_training_and_twice_in_jobs_it_ends_in_the_same_bytes(pictures: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    # Imports are made once, in a process that has no threads; each run begins from there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.segment_patches", "features.segment", "features.mask_jobs", "features.mask_results",
                                    "ingest.patches", "utils.loader", "rasterio"])  # fmt: skip
    for where, number in (("train", 17), ("train", 8), ("predict", 2), ("predict", 1)):
        process = context.Process(target=die, args=(flags(pictures, output), where, number, torch.get_num_threads()))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not list(output.glob("v*-ramp"))
    assert call(*flags(pictures, output)) == 0
    # Twice a job was killed; the second process did one job more before it was.
    assert sorted(row["attempts"] for row in queue_rows(output))[-2:] == [2, 2]
    assert sum(row["attempts"] - 1 for row in queue_rows(output)) == 2
    whole, again = (load_checkpoint(folder / "checkpoint").part("average") for folder in (finished, output))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert digest(output) == digest(finished)
    for part in ("masks", "stitched", "sheets"):
        assert files(results(output) / part) == files(results(finished) / part)


def test_a_few_jobs_at_a_time_end_in_the_same_version(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    checkpoint = finished / "checkpoint"
    left = []
    for _ in range(20):
        code, result, _ = segment(pictures, tmp_path / "out", checkpoint=checkpoint, jobs=3)
        assert code == 0
        assert result is not None
        left.append(result["jobs_left"])
        if not left[-1]:
            break
        assert result["dice"] is None
        assert result["masks"] == 0
    assert left == [*range(len(queue_rows(finished)) - 3, 0, -3), 0]
    assert digest(tmp_path / "out") == digest(finished)
    assert not (tmp_path / "out" / "checkpoint").exists(), "a given checkpoint is not trained on"


def test_stitching_that_was_stopped_goes_on_with_the_next_picture(pictures: Path, finished: Path, tmp_path: Path,
                                                                  segment: Callable[..., Outcome],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(results(tmp_path / "out"))
    real, done = mask_results.stitch, []

    def stopped(*args: Any, **more: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[1].name)
        return real(*args, **more)

    monkeypatch.setattr(mask_results, "stitch", stopped)
    code, result, last = segment(pictures, tmp_path / "out")
    assert (code, result) == (130, None)
    assert last == "interrupted; run the same command again to go on"
    first = list(done)
    monkeypatch.setattr(mask_results, "stitch", lambda *args, **more: done.append(args[1].name) or real(*args, **more))
    assert segment(pictures, tmp_path / "out")[0] == 0
    assert len(done) == len(set(done)) == 7
    assert done[:3] == first
    assert files(results(tmp_path / "out") / "masks") == files(results(finished) / "masks")


def test_of_two_commands_that_stitch_at_once_each_picture_is_stitched_by_one(finished: Path, tmp_path: Path,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    output, begun, real = tmp_path / "out", [], mask_results.stitch
    shutil.copytree(finished, output)
    shutil.rmtree(results(output))
    (probabilities,) = (output / "probabilities").glob("v*")
    asked, both, lock = set(), threading.Event(), durable.lock

    def noted(*args: Any, **more: Any) -> Any:
        asked.add(threading.get_ident())
        if len(asked) == 2:
            both.set()
        return lock(*args, **more)

    def held(cuts: Any, target: Path, **more: Any) -> Path:
        begun.append(target.name)
        assert both.wait(30), "the other command comes while this one stitches"
        return real(cuts, target, **more)

    def one(_: int) -> Any:
        patches = Warehouse.open(output / "patches")
        return mask_results.stitch_pictures(patches, probabilities, output, blend="ramp", tolerance=2).scores

    monkeypatch.setattr(mask_results, "stitch", held)
    monkeypatch.setattr(durable, "lock", noted)
    with ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(one, range(2)))
    assert len(begun) == len(set(begun)) == 7
    assert scores[0] == scores[1]
    assert files(results(output) / "stitched") == files(results(finished) / "stitched")
    assert sorted(path.name for path in results(output).iterdir()) == ["index.html", "masks", "scores.json", "sheets", "stitched"]


def test_probabilities_may_be_deleted_and_are_predicted_anew_only_where_a_picture_is_not_stitched(
    pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(finished, output)
    shutil.rmtree(output / "probabilities")
    shutil.rmtree(results(output) / "masks")
    code, result, _ = segment(pictures, output)
    assert code == 0
    assert result is not None
    assert result["scores"] == json.loads((results(finished) / "scores.json").read_text())["scores"]
    assert files(results(output)) == files(results(finished))
    assert not list((output / "probabilities").glob("v*"))
    assert {row["attempts"] for row in queue_rows(output)} == {1}
    shutil.rmtree(results(output) / "stitched" / "images_free.zarr")
    code, result, _ = segment(pictures, output)
    assert code == 0
    assert result is not None
    assert (result["masks"], result["jobs_left"]) == (7, 0)
    assert digest(output) == digest(finished)
    assert files(results(output)) == files(results(finished))


def test_another_blend_is_another_folder_and_nothing_is_predicted_again(pictures: Path, finished: Path, tmp_path: Path,
                                                                        segment: Callable[..., Outcome]) -> None:  # fmt: skip
    shutil.copytree(finished, tmp_path / "out")
    code, result, _ = segment(pictures, tmp_path / "out", blend="constant")
    assert code == 0
    assert result is not None
    assert result["path"].endswith("-constant")
    assert {row["attempts"] for row in queue_rows(tmp_path / "out")} == {1}
    assert files(results(tmp_path / "out")) == files(results(finished)), "the first result is left alone"


def test_other_patches_are_a_second_manifest_and_need_an_output_of_their_own(pictures: Path, finished: Path, tmp_path: Path,
                                                                           segment: Callable[..., Outcome]) -> None:  # fmt: skip
    shutil.copytree(finished, tmp_path / "out")
    code, _, last = segment(pictures, tmp_path / "out", overlap=16)
    assert code == 1
    assert "--segment.output" in last
    names = sorted(path.name for path in (tmp_path / "out").glob("patch_manifest*"))
    assert names == [f"patch_manifest.v00{n}.{kind}" for n in (1, 2) for kind in ("csv", "parquet")]
    first, second = (pq.read_table(tmp_path / "out" / f"patch_manifest.v00{n}.parquet") for n in (1, 2))
    assert len(second) > len(first)
    assert {"patch_id", "parent", "x1", "y1", "x2", "y2", "offset_x", "offset_y", "features_path"} <= set(first.column_names)
    code, result, _ = segment(pictures, tmp_path / "out", overlap=16, checkpoint=finished / "checkpoint")
    assert code == 0, "a finished checkpoint takes any patches it fits"
    assert result is not None
    assert result["masks"] == 7


def test_a_changed_model_is_refused_by_name(pictures: Path, finished: Path, tmp_path: Path, segment: Callable[..., Outcome]) -> None:
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


@pytest.mark.parametrize(("spoil", "more", "words"), [
    (of_another_kind, {}, "not of a U-Net"),
    (torn, {}, "checkpoint"),
    (gone, {}, "checkpoint"),
    (None, {"channels": 1}, "other channels.*expected 1, found 3.*segment.checkpoint"),
    (None, {"mask_values": '{"0": 0, "255": 2}'}, "other classes.*expected 3, found 2"),
    (None, {"patch_size": 33, "stem": 1, "levels": 1}, "does not take patches of this size.*multiple of 4, found 33 x 33"),
], ids=["another kind", "torn", "gone", "channels", "classes", "patch size"])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_a_line_with_a_remedy(pictures: Path, finished: Path, tmp_path: Path,
                                                                segment: Callable[..., Outcome], spoil: Any,
                                                                more: dict[str, Any], words: str) -> None:  # fmt: skip
    shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    shutil.copytree(finished / "patches", tmp_path / "out" / "patches")
    if spoil is not None:
        spoil(tmp_path / "checkpoint")
    code, result, last = segment(pictures, tmp_path / "out", checkpoint=tmp_path / "checkpoint", **more)
    assert (code, result) == (1, None)
    assert last.startswith("error: ")
    assert re.search(words, last), last
    assert not (tmp_path / "out" / "jobs").exists()


def test_training_that_ran_out_of_minutes_predicts_nothing_and_goes_on(pictures: Path, finished: Path, tmp_path: Path,
                                                                      segment: Callable[..., Outcome]) -> None:  # fmt: skip
    code, result, last = segment(pictures, tmp_path / "out", max_minutes=1e-6)
    assert code == 0
    assert result is not None
    assert (result["finished"], result["masks"], result["dice"]) == (False, 0, None)
    assert last == "training is not finished; next: the same command again"
    assert not (tmp_path / "out" / "probabilities").exists()
    assert segment(pictures, tmp_path / "out")[1]["finished"]
    assert digest(tmp_path / "out") == digest(finished)


def test_training_holds_neither_the_patches_in_memory_nor_all_it_evaluates(pictures: Path, tmp_path: Path, segment: Callable[..., Outcome],
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """`store: auto` would decode a split into memory while it fits: a picture of 20,000 x 20,000 would be there twice."""
    stores: list[tuple[str, str]] = []

    class Noted(ChunkLoader):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            stores.append((self.split.name, self.store))

    monkeypatch.setattr("utils.loader.ChunkLoader", Noted)
    assert segment(pictures, tmp_path / "out", epochs=1, limit_batches=1)[0] == 0
    assert stores == [("train", "pread"), ("val", "pread")]


def test_grey_pictures_without_masks_are_predicted_by_a_model_of_colour(pictures: Path, finished: Path, tmp_path: Path,
                                                                        segment: Callable[..., Outcome]) -> None:  # fmt: skip
    (tmp_path / "in").mkdir()
    for name, side in (("a.png", 33), ("b.png", 64)):
        Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side + 7), np.uint8)).save(tmp_path / "in" / name)
    code, result, last = segment(tmp_path / "in", tmp_path / "out")
    assert code == 1
    assert "no picture with a mask is in the split train" in last
    code, result, _ = segment(tmp_path / "in", tmp_path / "out", checkpoint=finished / "checkpoint", channels=3)
    assert code == 0
    assert result is not None
    assert (result["masks"], result["scores"], result["dice"]) == (2, {}, None)
    assert pixels_of(results(tmp_path / "out") / "masks" / "a.png").shape == (33, 40)


def test_a_damaged_chunk_of_probabilities_is_never_stitched(pictures: Path, finished: Path, tmp_path: Path,
                                                            segment: Callable[..., Outcome]) -> None:  # fmt: skip
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(results(tmp_path / "out"))
    path = next((tmp_path / "out" / "probabilities").glob("v*/warehouse.zarr/train/probability/c/0/0/0/0"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    code, _, last = segment(pictures, tmp_path / "out")
    assert code == 1
    assert "train/probability/c/0/0/0/0" in last


def test_a_mask_whose_picture_is_missing_is_said(pictures: Path, finished: Path, tmp_path: Path,
                                                 segment: Callable[..., Outcome]) -> None:  # fmt: skip
    shutil.copytree(pictures, tmp_path / "in")
    (tmp_path / "in" / "images" / "scene_00001.png").rename(tmp_path / "in" / "images" / "scene_1.png")
    code, _, _ = segment(tmp_path / "in", tmp_path / "out", checkpoint=finished / "checkpoint", jobs=1)
    assert code == 0
    lines = Warehouse.open(tmp_path / "out" / "patches").manifest.warnings
    assert any("1 masks have no picture of their name, such as masks/scene_00001.png" in line for line in lines)


def test_membrane_is_fifteen_parents_of_nine_patches(shared_data: Path, tmp_path: Path) -> None:
    build = BuildSettings(input_root=str(shared_data / "membrane"), format="masks", output_root=str(tmp_path), group_pattern=None)
    found = survey(list_pictures(build), build, least=256, unreadable={})
    assert len(found.parents) == 15
    assert found.grey
    assert not found.rejected
    assert all(parent.mask == parent.source.replace("image/", "label/") for parent in found.parents)
    assert {len(patch_boxes(parent.width, parent.height, 256, 64)) for parent in found.parents} == {9}
