"""Checkpoints: round trip, atomic replacement, and a typed error for everything that is not one."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from utils.training.checkpoint import (
    load_checkpoint,
    load_module,
    prefixed,
    save_checkpoint,
)
from utils.training.optimizer import optimizer_tensors, restore_optimizer
from warehouse.errors import ConfigError, CorruptError, StateError, TrainingError

ESCAPING = '{"format": 1, "file": "../x.safetensors", "size": 1, "sha256": "", "meta": {}}'


def saved(folder: Path, value: float = 1.0) -> Path:
    return save_checkpoint(
        folder,
        {"model.weight": torch.full((3, 2), value), "model.steps": torch.tensor(7)},
        {"step": 7},
    )


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_tensors_and_meta_come_back_as_they_went(tmp_path):
    tensors = {
        "model.a": torch.randn(4, 3),
        "model.b": torch.tensor(5),
        "average.a": torch.randn(4, 3).t(),
        "optimizer.0.step": torch.tensor(2.0),
    }
    path = save_checkpoint(tmp_path / "new", tensors, {"step": 3, "names": ["<b>", "é"]})
    back = load_checkpoint(path)
    assert back.meta == {"step": 3, "names": ["<b>", "é"]}
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[name], value) for name, value in tensors.items())
    assert list(back.part("average")) == ["a"]


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        saved(tmp_path / name)
    assert (tmp_path / "one" / "checkpoint.json").read_bytes() == (
        tmp_path / "two" / "checkpoint.json"
    ).read_bytes()
    assert tensor_file(tmp_path / "one").read_bytes() == tensor_file(tmp_path / "two").read_bytes()


def test_a_new_checkpoint_leaves_one_tensor_file(tmp_path):
    saved(tmp_path, 1.0)
    saved(tmp_path, 2.0)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert load_checkpoint(tmp_path).tensors["model.weight"][0, 0].item() == 2.0


@pytest.mark.parametrize("crash_at", range(1, 5))
def test_a_crash_at_any_rename_or_fsync_leaves_a_whole_checkpoint(tmp_path, monkeypatch, crash_at):
    class Crash(BaseException):
        pass

    saved(tmp_path, 1.0)
    calls = 0

    def dying(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == crash_at:
                raise Crash
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    with pytest.raises(Crash):
        saved(tmp_path, 2.0)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path).tensors["model.weight"][0, 0].item() in {1.0, 2.0}
    saved(tmp_path, 3.0)
    assert load_checkpoint(tmp_path).tensors["model.weight"][0, 0].item() == 3.0


def test_a_folder_without_a_checkpoint_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(ConfigError, match="train_detector"):
        load_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    "keep", [0, 1, 0.5, -1], ids=["empty", "one byte", "half", "all but one byte"]
)
def test_a_truncated_tensor_file_is_refused_by_name(tmp_path, keep):
    saved(tmp_path)
    path = tensor_file(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(CorruptError, match=path.name):
        load_checkpoint(tmp_path)


def test_every_flipped_bit_in_the_tensors_is_refused(tmp_path):
    saved(tmp_path)
    path = tensor_file(tmp_path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(CorruptError):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "NaN", "[" * 100_000, '{"format": 1}', ESCAPING],
    ids=["empty", "torn", "list", "null", "nan", "deep", "bare", "path that escapes"],
)
def test_an_index_that_is_not_ours_is_a_typed_error(tmp_path, text):
    saved(tmp_path)
    (tmp_path / "checkpoint.json").write_text(text)
    with pytest.raises(CorruptError, match=r"checkpoint\.json"):
        load_checkpoint(tmp_path)


def test_another_format_number_is_a_state_error(tmp_path):
    path = saved(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(StateError, match="99"):
        load_checkpoint(tmp_path)


def test_a_missing_or_linked_tensor_file_is_refused(tmp_path):
    saved(tmp_path)
    path = tensor_file(tmp_path)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="missing"):
        load_checkpoint(tmp_path)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="missing"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_with_the_tensors_name(tmp_path, bad):
    saved(tmp_path, bad)
    with pytest.raises(CorruptError, match=r"model\.weight"):
        load_checkpoint(tmp_path)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path):
    module = nn.Linear(2, 3)
    before = module.weight.detach().clone()
    for tensors in (
        {"weight": torch.zeros(3, 2)},
        {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)},
        {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "extra": torch.zeros(1)},
    ):
        with pytest.raises(StateError, match="another model"):
            load_module(module, tensors, tmp_path)
    assert torch.equal(module.weight, before)


def test_optimizer_state_continues_where_it_stopped(tmp_path):
    def step(module, optimizer):
        optimizer.zero_grad()
        module(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()

    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(3):
        step(module, optimizer)
    save_checkpoint(
        tmp_path,
        prefixed("model", module.state_dict())
        | prefixed("optimizer", optimizer_tensors(optimizer)),
        {},
    )
    back = load_checkpoint(tmp_path)
    other = nn.Linear(2, 2)
    resumed = torch.optim.AdamW(other.parameters(), lr=0.1)
    load_module(other, back.part("model"), tmp_path)
    restore_optimizer(resumed, back.part("optimizer"), tmp_path)
    step(module, optimizer)
    step(other, resumed)
    assert torch.equal(module.weight, other.weight)
    with pytest.raises(StateError):
        restore_optimizer(
            torch.optim.AdamW(nn.Linear(5, 1).parameters()), back.part("optimizer"), tmp_path
        )


def test_an_output_that_is_a_file_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        saved(tmp_path / "file")
