"""A trained head on a version of features, once more: held-out figures in milliseconds, for nothing
is encoded again.

A head is of one encoder: on features by other weights or of otherwise prepared pictures it would
answer, and wrongly. So versions must agree on name, weights and preprocessing of the encoder, on
classes, and - unless asked otherwise - on the pictures.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from features.head import Cached, Head, score
from features.metrics import draw_confusion
from utils.training.checkpoint import Checkpoint, known_model, load_module
from warehouse.errors import StateError

__all__ = ["check_same_features", "restore_head", "score_head"]

REMEDY = "train one with python -m scripts.train_head"
KINDS = ("linear", "mlp", "attention")
MOST = {"width": 1_000_000, "hidden": 65_536}


def restore_head(checkpoint: Checkpoint) -> Head:
    """The head of a checkpoint, in eval mode. Raises StateError when it is none of ours."""
    said = known_model(checkpoint, [f"head-{kind}" for kind in KINDS], "a head", REMEDY)
    try:
        shape = {key: int(said[key]) for key in MOST}
        classes = [str(name) for name in said["classes"]]
        wrong = [f"{key} {value}" for key, value in shape.items() if not 1 <= value <= MOST[key]]
        if wrong or not 2 <= len(classes) <= 100_000:
            raise ValueError(", ".join(wrong) or f"{len(classes)} classes")
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(
            "the checkpoint is not of a head",
            where=checkpoint.path,
            found=str(error),
            remedy=REMEDY,
        ) from None
    head = Head(
        str(said["kind"]).removeprefix("head-"), shape["width"], len(classes), shape["hidden"], 0.0
    )
    load_module(head, checkpoint.part("head"), checkpoint.path)
    return head.eval()


def check_same_features(
    checkpoint: Checkpoint, cached: Cached, *, other_pictures: bool = False
) -> None:
    """Raises StateError when the features are not of the checkpoint's encoder, preprocessing,
    classes or (unless other_pictures) store, or when it is no head's."""
    known_model(checkpoint, [f"head-{kind}" for kind in KINDS], "a head", REMEDY)
    then, now = checkpoint.meta.get("encoder"), cached.encoder
    then = then if isinstance(then, dict) else {}
    pairs = [
        (f"another {what}", now.get(key), then.get(key))
        for what, key in (
            ("encoder", "name"),
            ("encoder", "weights_sha256"),
            ("preprocessing", "preprocessing"),
        )
    ]
    pairs.append(
        ("other classes", list(cached.class_names), checkpoint.meta["model"].get("classes"))
    )
    if not other_pictures:
        pairs.append(("another store", cached.source, checkpoint.meta.get("source")))
    for what, found, expected in pairs:
        if found != expected:
            remedy = "name the version it was trained on with --head.features, or make features with its encoder"
            if what == "another store":
                remedy = "to score it on pictures it was not trained beside, give --head.other_pictures true"
            raise StateError(
                f"these features are of {what} than the head's",
                where=f"{cached.version} for {checkpoint.path}",
                expected=expected,
                found=found,
                remedy=remedy,
            )


def score_head(checkpoint: Checkpoint, cached: Cached, picture: Path) -> dict[str, Any]:
    """Figures of the held-out split and `seconds`; the confusion matrix is drawn as `picture`.

    Raises StateError as above.
    """
    start = time.monotonic()
    head = restore_head(checkpoint)
    inputs = cached.spatial if head.kind == "attention" else cached.pooled
    if not inputs:
        raise StateError(
            "the attention head needs feature maps",
            where=cached.version,
            remedy="python -m scripts.extract_features --features.feature_map true",
        )
    figures, matrix = score(head, inputs[cached.held_out], cached.target[cached.held_out])
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
