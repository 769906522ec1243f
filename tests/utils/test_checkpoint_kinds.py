"""A checkpoint given to the wrong command.

The kind found and the command that takes it, in a line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detector.task import restore_detector
from utils.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from utils.training.run.run_state import check_same_run
from vqvae.compress.codec import restore_vqvae
from warehouse.errors import StateError


def saved(folder: Path, model: Any) -> Path:
    save_checkpoint(folder, {"model.weight": torch.ones(2)}, {"model": model})
    return folder


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            {"kind": "vqvae"},
            r"expected kind tiny or big, found kind 'vqvae'; .*compress_zarr "
            r"--compress\.checkpoint .*/c; train",
        ),
        ({"kind": "head-linear"}, "found kind 'head-linear'"),
        (
            {"kind": "finetuned"},
            r"found kind 'finetuned'; .*extract_features --features\.encoder .*/c; train",
        ),
        ({}, "found no kind of model"),
        (None, "found no kind of model"),
    ],
)
def test_infer_view_says_what_else_it_was_given(tmp_path: Path, model: Any, words: str) -> None:
    with pytest.raises(StateError, match=f"not of a detector.*{words}") as raised:
        restore_detector(load_checkpoint(saved(tmp_path / "c", model)))
    assert "\n" not in str(raised.value)
    assert "train one with python -m scripts.train_detector" in str(raised.value.remedy)


@pytest.mark.parametrize("kind", ["tiny", "big"])
def test_compress_zarr_says_that_it_was_given_a_detector(tmp_path: Path, kind: str) -> None:
    words = (
        rf"not of a VQ-VAE.*expected kind vqvae.*found kind '{kind}'.*scripts\.infer_view "
        r"--infer\.checkpoint .*train_vqvae"
    )
    with pytest.raises(StateError, match=words):
        restore_vqvae(saved(tmp_path / "c", {"kind": kind}))


def test_a_resume_names_the_first_thing_that_differs_not_the_whole_model() -> None:
    features = [{"name": "red", "codes": []}, {"name": "class", "codes": [0, 1]}]
    now = {"kind": "vqvae", "width": 32, "features": features}
    then = Checkpoint({}, {}, Path("x/checkpoint.json"))
    other = [features[0], {"name": "cover", "codes": [0, 1]}]
    for model, words in (
        ({"kind": "big", "a": 1}, "model.kind; expected vqvae, found big"),
        (now | {"width": 64}, "model.width; expected 32, found 64"),
        (now | {"features": other}, "model.features.1.name; expected class, found cover"),
        (
            {key: value for key, value in now.items() if key != "width"},
            "model.width; expected 32, found null",
        ),
    ):
        with pytest.raises(StateError, match=re.escape(words)) as raised:
            check_same_run(then, {"model": (now, model)}, "train again")
        assert len(str(raised.value)) < 200
    check_same_run(then, {"model": (now, dict(now))}, "train again")


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values, json_values)
def test_any_two_values_that_differ_are_told_apart(now: Any, then: Any) -> None:
    checkpoint = Checkpoint({}, {}, Path("x/checkpoint.json"))
    if now == then:
        check_same_run(checkpoint, {"model": (now, then)}, "train again")
        return
    with pytest.raises(StateError, match="of another run"):
        check_same_run(checkpoint, {"model": (now, then)}, "train again")
