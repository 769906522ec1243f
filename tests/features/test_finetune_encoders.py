"""Checkpoints as encoders: fine-tuned ones, a detector's, a VQ-VAE's.

And the commands from pictures to heads on them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetune_fakes import OURS, make_task, make_trainer, pictures, toy_encoder
from folder_fakes import baked, class_folders
from vqvae_fakes import FEATURES, SHAPE

from detector.backbone import detector_trunk
from detector.model import make_model
from features.encoders.network import NetworkEncoder, weights_digest
from features.encoders.open_encoder import open_encoder
from scripts import extract_features, finetune, train_head
from scripts._command import run
from utils.loader import ChunkLoader
from utils.loading.stores import bounded_memory_store
from utils.tracking.experiment_log import ExperimentLog
from utils.training.checkpoint import load_checkpoint, prefixed, save_checkpoint
from vqvae.image_encoder import ImageMap, vqvae_trunk
from vqvae.network.model import VQVAE, Shape, space_to_depth
from warehouse.errors import ConfigError, CorruptError, StateError
from warehouse.format.location import Remote
from warehouse.layouts.features import Feature

ALL = {**OURS, "tiny": detector_trunk, "big": detector_trunk, "vqvae": vqvae_trunk}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    make_trainer(folder, make_task(folder, epochs=2, head_epochs=0), epochs=2, head_epochs=0).run()
    return folder


def test_a_fine_tuned_checkpoint_is_an_encoder_with_the_kept_weights(tuned):
    encoder = open_encoder(str(tuned), backbones=OURS)
    task = make_task(tuned)
    task.model.load_state_dict(load_checkpoint(tuned).part("average"))
    images = pictures("test", 24)  # another size than the encoder's
    with torch.inference_mode():
        said, wanted = encoder(images), task.model.encoder(images)
    torch.testing.assert_close(said.pooled, wanted.pooled)
    about = encoder.fingerprint()
    assert (
        about["weights_sha256"]
        == weights_digest(task.model.network)
        != toy_encoder().weights_sha256
    )
    assert (about["name"], about["random"], about["preprocessing"]["size"]) == (
        "finetuned-toy",
        False,
        [16, 16],
    )
    assert encoder.last_blocks(1)[0] is encoder.network.blocks[2]
    assert open_encoder(str(tuned / "checkpoint.json"), size=32, backbones=OURS).size == (32, 32)


def test_the_state_of_a_run_under_way_is_an_encoder_too(tuned):
    encoder = open_encoder(str(tuned / "training"), backbones=OURS)
    average = load_checkpoint(tuned / "training").part("average")
    assert torch.equal(encoder.network.top.weight, average["network.top.weight"])


def test_a_fine_tuned_encoder_can_be_fine_tuned_again(tuned, tmp_path):
    encoder = open_encoder(str(tuned), backbones=OURS)
    make_trainer(tmp_path, make_task(tmp_path, encoder=encoder, epochs=2), epochs=2).run()
    again = open_encoder(str(tmp_path), backbones=OURS)
    assert again.name == "finetuned-toy"
    assert torch.equal(again.network.stem.weight, toy_encoder().network.stem.weight), (
        "never unfrozen"
    )


@pytest.mark.parametrize(("blocks", "random"), [(2, True), (None, False)])
def test_weights_that_were_drawn_and_never_trained_are_still_called_random(
    tmp_path, blocks, random
):
    make_trainer(
        tmp_path,
        make_task(tmp_path, encoder=toy_encoder(random=True), blocks=blocks, epochs=2),
        blocks=blocks,
        epochs=2,
    ).run()
    assert open_encoder(str(tmp_path), backbones=OURS).random is random


def change(folder: Path, edit) -> None:
    index = json.loads((folder / "checkpoint.json").read_text())
    edit(index["meta"]["model"])
    (folder / "checkpoint.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "error", "match"),
    [
        (lambda said: said.update(kind="head-linear"), StateError, "not of an encoder"),
        (lambda said: said.update(kind="unet"), StateError, r"expected kind finetuned or toy"),
        (
            lambda said: said["encoder"].pop("recipe"),
            StateError,
            "not of a fine-tuned encoder.*recipe",
        ),
        (
            lambda said: said["encoder"]["recipe"].update(kind="other"),
            StateError,
            "kind 'other' cannot be opened here",
        ),
        (lambda said: said["encoder"]["recipe"].update(width=12), StateError, "of shape"),
        (lambda said: said["encoder"].update(blocks=["nowhere.1"]), StateError, "nowhere"),
        (
            lambda said: said["encoder"]["preprocessing"].update(size=[10**6, 3]),
            StateError,
            "preprocessing",
        ),
        (lambda said: said.update(encoder=3), StateError, "not of a fine-tuned encoder"),
    ],
)
def test_checkpoints_that_are_no_encoders_are_refused_in_a_line(
    tuned, tmp_path, edit, error, match
):
    saved = load_checkpoint(tuned)
    save_checkpoint(tmp_path, saved.tensors, saved.meta)
    change(tmp_path, edit)
    with pytest.raises(error, match=match) as caught:
        open_encoder(str(tmp_path), backbones=OURS)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_corrupt(tuned, tmp_path):
    saved = load_checkpoint(tuned)
    save_checkpoint(tmp_path, saved.tensors, saved.meta)
    path = next(tmp_path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="digest"):
        open_encoder(str(tmp_path), backbones=OURS)


def test_an_encoder_without_a_recipe_is_not_fine_tuned(tmp_path):
    plain = toy_encoder()
    encoder = NetworkEncoder("plain", plain.network, plain.blocks, size=(16, 16))
    with pytest.raises(ConfigError, match="no recipe"):
        make_task(tmp_path, encoder=encoder)


# ---- a VQ-VAE


def rgb(*names: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(name, "continuous", mean=40.0 + at, std=7.0 + at, minimum=0.0, maximum=255.0)
        for at, name in enumerate(names)
    )


def saved_vqvae(folder: Path, features: tuple[Feature, ...], shape: Shape = SHAPE) -> VQVAE:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = VQVAE(features, shape).eval()
        for value in model.encoder.parameters():
            value.data.add_(
                0.1 * torch.randn(value.shape)
            )  # blocks begin as the identity, which would prove little
    save_checkpoint(folder, prefixed("average", model.state_dict()), {"model": model.describe()})
    return model


@pytest.mark.parametrize(
    ("names", "channels"),
    [(("b1", "b2", "b3"), (0, 1, 2)), (("blue", "red", "green"), (2, 0, 1)), (("height",), None)],
    ids=["three in order", "colours by name", "one takes the luma"],
)
@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        Shape(
            (4, 16, 16), stride=(4, 8, 8), patch=(2, 4, 4), width=16, depth=2, code_dim=4, levels=1
        ),
    ],
)
def test_a_vqvae_reads_a_picture_as_a_block_that_stands_still(tmp_path, names, channels, shape):
    """Against the model's own latent of a block in physical units, filled by hand."""
    features = rgb(*names)
    model = saved_vqvae(tmp_path, features, shape)
    encoder = open_encoder(str(tmp_path), backbones=ALL)
    images = torch.randint(
        0,
        256,
        (2, 3, *shape.block[1:]),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    value = images.float() / 255
    value = (
        value[:, list(channels)]
        if channels
        else (value * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    )
    mean, std = (
        torch.tensor([getattr(feature, key) for feature in features]) for key in ("mean", "std")
    )
    block = (
        (mean + std * (value.movedim(1, -1) - 0.5) / 0.25)
        .unsqueeze(1)
        .expand(-1, shape.block[0], -1, -1, -1)
    )
    with torch.inference_mode():
        said = encoder(images)
        fine = model.encoder(
            model.stem(
                space_to_depth(
                    model.stacked(block, torch.ones_like(block, dtype=torch.bool)), shape.patch
                )
            )
        )
        latent = model.latent(block, torch.ones_like(block, dtype=torch.bool))
        torch.testing.assert_close(model.squeeze(space_to_depth(fine, model.inner)), latent)
    torch.testing.assert_close(said.spatial, fine.mean(dim=2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.pooled, fine.mean(dim=(2, 3, 4)), rtol=1e-4, atol=1e-5)
    assert encoder.name == "vqvae"
    assert len(encoder.blocks) == 1 + shape.depth
    assert encoder.last_blocks(1)[0] is encoder.network.encoder[-1]


def test_a_vqvae_takes_pictures_of_any_size(tmp_path):
    saved_vqvae(tmp_path, rgb("b1", "b2", "b3"))
    encoder = open_encoder(str(tmp_path), backbones=ALL)
    assert encoder(torch.zeros(1, 3, 21, 30, dtype=torch.uint8)).spatial.shape == (1, 16, 6, 8)


@pytest.mark.parametrize(
    "features",
    [FEATURES, rgb("a", "b"), rgb("red", "green", "blue", "nir")],
    ids=["kinds", "two", "four"],
)
def test_a_vqvae_whose_features_pictures_cannot_fill_is_refused_by_their_names(tmp_path, features):
    saved_vqvae(tmp_path, features)
    with pytest.raises(StateError, match=rf"images cannot fill.*{features[0].name} \(continuous\)"):
        open_encoder(str(tmp_path), backbones=ALL)


def test_a_fine_tuned_vqvae_is_an_encoder(tmp_path):
    saved_vqvae(tmp_path / "vqvae", rgb("blue", "green", "red"))
    encoder = open_encoder(str(tmp_path / "vqvae"), size=16, backbones=ALL)
    stem = encoder.network.stem.weight.clone()
    changes = {"blocks": 1, "epochs": 2, "head_epochs": 0}
    make_trainer(tmp_path, make_task(tmp_path, encoder=encoder, **changes), **changes).run()
    again = open_encoder(str(tmp_path), backbones=ALL)
    assert (again.name, again.network.order) == ("finetuned-vqvae", (2, 1, 0))
    assert torch.equal(again.network.stem.weight, stem)
    assert not torch.equal(
        again.network.encoder[0].body[2].weight, encoder.network.encoder[0].body[2].weight
    )


@pytest.mark.parametrize(
    "recipe",
    [
        {"order": [0, 1, 5]},
        {"order": [0]},
        {"grid": [1, 2]},
        {"patch": [0, 4, 4]},
        {"width": 10**6},
        {"depth": -1},
        {"width": None},
    ],
)
def test_a_recipe_that_is_none_is_refused(recipe):
    good = ImageMap(order=(0, 1, 2), grid=(1, 2, 2), patch=(5, 4, 4), width=16, depth=1).recipe()
    assert vqvae_trunk(good).recipe == good
    with pytest.raises((ValueError, TypeError)):
        vqvae_trunk({**good, **recipe})
    for wrong in ({"kind": "huge", "width": 8}, {"kind": "big", "width": 0}):
        with pytest.raises(ValueError, match="kind"):
            detector_trunk(wrong)


# ---- commands


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a script's main as its command line would: (exit code, result, stderr)."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(script, *argv):
        code = run(script.main, script.Settings, script.__doc__, argv)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, json.loads(out.strip().splitlines()[-1]) if out.strip() else None, err

    return call


@pytest.fixture
def source(tmp_path, monkeypatch):
    """(warehouse of three classes, folder of a detector's checkpoint)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    class_folders(tmp_path / "in", each=20)
    baked(tmp_path / "in", tmp_path / "classes", format="classes", target_size=(64, 64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_model(kind="big", width=8)
    facts = {
        "max_boxes": 1,
        "class_names": ["a"],
        "canvas": [64, 64],
        "pad_value": 114,
        "resize_mode": "letterbox",
    }
    save_checkpoint(
        tmp_path / "detector",
        prefixed("average", model.state_dict()),
        {"model": {**model.describe(), "facts": facts}},
    )
    return tmp_path / "classes", tmp_path / "detector"


def test_from_a_detector_to_a_fine_tuned_encoder_to_features_to_heads(command, source, tmp_path):
    warehouse, detector = map(str, source)
    database = tmp_path / "experiments.db"
    shared = ["--experiments.db", str(database)]
    asked = [
        "--finetune.warehouse",
        warehouse,
        "--finetune.encoder",
        detector,
        "--finetune.output",
        str(tmp_path / "out"),
        "--finetune.epochs",
        "2",
        "--finetune.head_epochs",
        "1",
        "--finetune.blocks",
        "2",
        "--finetune.accumulate",
        "8",
    ]
    code, first, err = command(finetune, *asked, "--finetune.max_minutes", "0.000001", *shared)
    assert (code, first["finished"], first["steps"]) == (0, False, 1)
    assert "continue with the same command" in err
    code, result, err = command(finetune, *asked, *shared)
    assert (code, result["finished"], result["steps"], result["held_out"]) == (0, True, 4, "test")
    assert {"accuracy", "peak_memory_gb", "checkpoint"} <= set(result)
    assert 0 < result["peak_memory_gb"] < 4
    assert "next: python -m scripts.extract_features --features.encoder" in err
    asked = [
        "--features.warehouse",
        warehouse,
        "--features.encoder",
        result["checkpoint"],
        "--features.work",
        str(tmp_path / "work"),
    ]
    code, features, _ = command(
        extract_features, *asked, "--features.output_root", str(tmp_path / "features")
    )
    assert (code, features["random"], features["jobs_left"]) == (0, False, 0)
    head = [
        "--head.features",
        str(tmp_path / "features"),
        "--head.epochs",
        "2",
        "--head.output",
        str(tmp_path / "heads"),
    ]
    code, heads, _ = command(train_head, *head, *shared)
    assert (code, heads["encoder"], len(heads["runs"])) == (0, "finetuned-detector-big", 3)
    with ExperimentLog(database) as opened:
        rows = opened.runs()
    assert [(row["trainer"], row["state"]) for row in rows] == [("finetune", "done")] + [
        ("head", "done")
    ] * 3
    assert rows[0]["resumed"] == 1


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            ["--finetune.blocks", "9"],
            r"so many blocks cannot be unfrozen: detector-big; expected 1 to 8, found 9",
        ),
        (["--finetune.memory_budget_gb", "0.01"], r"below the model's own size"),
        (
            ["--finetune.encoder", "nowhere/at-all", "--finetune.offline", "true"],
            "weights are not there",
        ),
        (["--finetune.epochs", "2"], "head_epochs 2 must be fewer than epochs 2"),
        (["--finetune.recompute", "true", "--finetune.norms", "trained"], "twice"),
        (["--finetune.warehouse", "IN"], "no published version|not a warehouse|no version"),
    ],
)
def test_refusals_are_one_line_with_exit_code_1(command, source, tmp_path, flags, match):
    flags = [str(tmp_path / "in") if flag == "IN" else flag for flag in flags]
    base = [
        "--finetune.warehouse",
        str(source[0]),
        "--finetune.encoder",
        str(source[1]),
        "--finetune.output",
        str(tmp_path / "out"),
    ]
    code, result, err = command(finetune, *base, *flags, "--experiments.db", "null")
    assert (code, result) == (1, None)
    assert re.search(match, err.strip().splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place", ["out", "out/checkpoint.json", "out/training", "link", "out/../out"]
)
def test_an_encoder_is_not_overwritten_by_what_is_made_of_it(command, source, tmp_path, place):
    encoder = tmp_path / ("out/training" if "training" in place else "out")
    shutil.copytree(source[1], encoder)
    (tmp_path / "link").symlink_to("out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, result, err = command(
        finetune,
        "--finetune.warehouse",
        str(source[0]),
        "--finetune.encoder",
        str(tmp_path / place),
        "--finetune.output",
        str(tmp_path / "out"),
        "--experiments.db",
        "null",
    )
    assert (code, result) == (1, None)
    assert re.search(
        r"would be overwritten.*choose another --finetune\.output", err.strip().splitlines()[-1]
    )
    assert {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    } == before


def test_the_budget_s_process_does_not_hold_the_splits(command, source, tmp_path, monkeypatch):
    """`store: auto` decodes what fits an eighth of the free memory, far more than the budget."""
    stores = []

    class Noted(ChunkLoader):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            stores.append((self.split.name, self.store))

    monkeypatch.setattr("features.finetuning.run_finetuning.ChunkLoader", Noted)
    asked = [
        "--finetune.warehouse",
        str(source[0]),
        "--finetune.encoder",
        str(source[1]),
        "--finetune.blocks",
        "2",
        "--finetune.max_minutes",
        "0.000001",
        "--experiments.db",
        "null",
    ]
    assert command(finetune, *asked, "--finetune.output", str(tmp_path / "auto"))[0] == 0
    assert stores == [("train", "pread"), ("test", "pread"), ("val", "pread")]
    stores.clear()
    assert (
        command(
            finetune,
            *asked,
            "--finetune.output",
            str(tmp_path / "said"),
            "--loader.store",
            "memory",
        )[0]
        == 0
    )
    assert {store for _, store in stores} == {"memory"}


@pytest.mark.parametrize(
    ("place", "foreign", "store"),
    [
        ("here", {}, "pread"),
        ("here", {"image": "why"}, "library"),
        (object.__new__(Remote), {}, "stream"),
    ],
)
def test_pictures_elsewhere_or_of_other_codecs_are_not_held_either(place, foreign, store):
    split = SimpleNamespace(warehouse=SimpleNamespace(store=place), foreign=lambda names: foreign)
    assert bounded_memory_store(split, ["image"]) == store


def test_random_efficientnet_survives_its_own_checkpoint(tmp_path):
    """The architecture from the recipe alone.

    Names, shapes and the features of the trained weights.
    """
    encoder = open_encoder("random:efficientnet_b0", size=32, seed=0)
    task = make_task(tmp_path, encoder=encoder, blocks=1)
    save_checkpoint(
        tmp_path, prefixed("average", task.model.state_dict()), {"model": task.describe()}
    )
    again = open_encoder(str(tmp_path))
    assert (again.name, again.random, again.size) == ("finetuned-efficientnet_b0", True, (32, 32))
    assert again.weights_sha256 == encoder.weights_sha256
    images = pictures("val")
    with torch.inference_mode():
        assert np.array_equal(again(images).pooled.numpy(), encoder(images).pooled.numpy())
    assert [len(level) > 0 for level in task.levels] == [True, False], (
        "the last block and the layers after it"
    )
