"""Score a trained head on a version of features in milliseconds, since nothing is encoded again.

A head belongs to one encoder. On features of other weights, or of images that were prepared in
another way, it would give wrong answers without an error. So the versions must agree on name,
weights and preprocessing of the encoder, on the classes and, unless asked otherwise, on the images.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from features.heads.cached import Cached, head_inputs
from features.heads.head import Head
from features.heads.train import score
from features.metrics import draw_confusion
from utils.training.checkpoint import Checkpoint, known_model, load_module
from warehouse.errors import StateError

__all__ = ["check_same_features", "restore_head", "score_head"]

REMEDY = "train one with python -m scripts.train_head"
KINDS = ("head-linear", "head-mlp", "head-attention")
MOST = {"width": 1_000_000, "hidden": 65_536}
"""Sizes that a checkpoint may ask for, so that a damaged one cannot exhaust memory."""
MOST_CLASSES = 100_000


def restore_head(checkpoint: Checkpoint) -> Head:
    """Return the head of a checkpoint, in eval mode.

    Raises
    ------
    StateError
        The checkpoint is not of a head, or asks for sizes above MOST.
    """
    model = known_model(checkpoint, KINDS, "a head", REMEDY)
    try:
        shape = {key: int(model[key]) for key in MOST}
        classes = len([str(name) for name in model["classes"]])
        wrong = [f"{key} {value}" for key, value in shape.items() if not 1 <= value <= MOST[key]]
        if wrong or not 2 <= classes <= MOST_CLASSES:
            raise ValueError(", ".join(wrong) or f"{classes} classes")
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(
            "the checkpoint is not of a head",
            where=checkpoint.path,
            found=str(error),
            remedy=REMEDY,
        ) from None
    kind = str(model["kind"]).removeprefix("head-")
    # Dropout is for training only, so a checkpoint does not record its rate.
    head = Head(kind, shape["width"], classes, shape["hidden"], 0.0)
    load_module(head, checkpoint.part("head"), checkpoint.path)
    head.eval()
    return head


def check_same_features(
    checkpoint: Checkpoint, cached: Cached, *, other_pictures: bool = False
) -> None:
    """Refuse features that the head was not trained for.

    Parameters
    ----------
    other_pictures
        Whether the features may be of another warehouse of images.

    Raises
    ------
    StateError
        The encoder, its preprocessing, the classes or, unless `other_pictures`, the warehouse of
        images differ; or the checkpoint is not of a head.
    """
    model = known_model(checkpoint, KINDS, "a head", REMEDY)
    recorded = checkpoint.meta.get("encoder")
    encoder = recorded if isinstance(recorded, dict) else {}
    # Name and weights: a name on a model hub may come to stand for other weights.
    pairs = [
        ("another encoder", cached.encoder.get("name"), encoder.get("name")),
        (
            "another encoder",
            cached.encoder.get("weights_sha256"),
            encoder.get("weights_sha256"),
        ),
        (
            "another preprocessing",
            cached.encoder.get("preprocessing"),
            encoder.get("preprocessing"),
        ),
        ("other classes", list(cached.class_names), model.get("classes")),
    ]
    remedy = (
        "name the version it was trained on with --head.features, or make features with its encoder"
    )
    for what, found, expected in pairs:
        _require_same(checkpoint, cached, what, (found, expected), remedy)
    if not other_pictures:
        source = checkpoint.meta.get("source")
        remedy = "to score it on images of another store, give --head.other_pictures true"
        _require_same(checkpoint, cached, "another store", (cached.source, source), remedy)


def _require_same(
    checkpoint: Checkpoint, cached: Cached, what: str, pair: tuple[Any, Any], remedy: str
) -> None:
    """Raise StateError unless `pair` agrees: what the features have, what the head learned from."""
    found, expected = pair
    if found != expected:
        raise StateError(
            f"these features are of {what} than the head's",
            where=f"{cached.version} for {checkpoint.path}",
            expected=expected,
            found=found,
            remedy=remedy,
        )


def score_head(checkpoint: Checkpoint, cached: Cached, picture: Path) -> dict[str, Any]:
    """Score a trained head on the held-out split.

    Parameters
    ----------
    picture
        PNG that the confusion matrix is drawn to.

    Returns
    -------
    dict
        `name`, the metrics, `held_out`, `seconds` and `path` of the checkpoint's folder.

    Raises
    ------
    StateError
        The checkpoint is not of a head, or an attention head has no feature maps to read.
    """
    start = time.monotonic()
    head = restore_head(checkpoint)
    inputs = head_inputs(cached, head.kind)
    figures, matrix = score(head, inputs[cached.held_out], cached.target[cached.held_out])
    # Without the drawing, which takes longer than the scoring.
    seconds = round(time.monotonic() - start, 4)

    name = str(checkpoint.meta.get("settings", {}).get("name", "head"))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_confusion(matrix, cached.class_names, picture, f"{name} on {cached.held_out}")
    return {
        "name": name,
        **figures,
        "held_out": cached.held_out,
        "seconds": seconds,
        "path": str(checkpoint.path.parent),
    }
