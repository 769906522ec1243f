"""Train the heads of all ablations, or score a trained one, and record the runs.

The features are read into memory once and shared by all runs, so that an ablation costs seconds.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from features.heads.cached import Cached, read_cached
from features.heads.scoring import check_same_features, score_head
from features.heads.train import ablated, train_head
from features.settings import HeadSettings
from utils.log import get_log
from utils.tracking.experiments import open_run
from utils.tracking.settings import ExperimentSettings
from utils.training.checkpoint import load_checkpoint
from warehouse.read.version import Warehouse

__all__ = ["score_trained_head", "train_heads"]

log = get_log(__name__)


def train_heads(
    warehouse: Warehouse, settings: HeadSettings, experiments: ExperimentSettings
) -> dict[str, object]:
    """Train a head for each ablation and compare them on the held-out split.

    Returns
    -------
    dict
        `runs`, `best` (its name), `features` (the version), `encoder` and `random`.
    """
    wanted = ablated(settings)
    cached = read_cached(warehouse, spatial=any(one.kind == "attention" for one in wanted))
    log.info(
        "%d features by %s%s, %.1f MB in memory, scored on %s",
        sum(map(len, cached.pooled.values())),
        cached.encoder["name"],
        " (random weights)" if cached.encoder["random"] else "",
        cached.megabytes,
        cached.held_out,
    )
    runs = []
    for one in wanted:
        result = _train_one(one, cached, experiments)
        runs.append(result)
        log.info(
            "%-16s accuracy %.3f  macro F1 %.3f  %.1f s",
            one.name,
            result["accuracy"],
            result["macro_f1"],
            result["seconds"],
        )
    # Chosen by the split that chose the epochs: the held-out split is for reporting only.
    best = max(runs, key=lambda result: result["selection_accuracy"])
    log.info("best: %s in %s; next: python -m scripts.inspect_runs", best["name"], best["path"])
    return _result(runs, best["name"], cached)


def score_trained_head(
    warehouse: Warehouse, settings: HeadSettings, checkpoint_folder: Path
) -> dict[str, object]:
    """Score a trained head on the features of a warehouse.

    Returns
    -------
    dict
        As of `train_heads`, with this head as the only run.

    Raises
    ------
    StateError
        The head was trained on other features; see `check_same_features`.
    """
    checkpoint = load_checkpoint(checkpoint_folder)
    kind = checkpoint.meta.get("model", {}).get("kind")
    cached = read_cached(warehouse, spatial=kind == "head-attention")
    check_same_features(checkpoint, cached, other_pictures=settings.other_pictures)
    # Named after the version, so that scores on several versions leave a figure each.
    picture = Path(settings.output) / f"confusion_{cached.version}.png"
    result = score_head(checkpoint, cached, picture)
    log.info(
        "%s: accuracy %.3f on %s in %.0f ms; next: python -m scripts.inspect_runs",
        result["name"],
        result["accuracy"],
        result["held_out"],
        1e3 * result["seconds"],
    )
    return _result([result], result["name"], cached)


def _result(runs: list[dict[str, Any]], best: str, cached: Cached) -> dict[str, object]:
    return {
        "runs": runs,
        "best": best,
        "features": cached.version,
        "encoder": cached.encoder["name"],
        "random": cached.encoder["random"],
    }


def _train_one(
    settings: HeadSettings, cached: Cached, experiments: ExperimentSettings
) -> dict[str, Any]:
    """Train one head as a run of the experiment log, or below `output` where none is kept."""
    about = settings.model_dump(mode="json", exclude={"ablations"}) | {"encoder": cached.encoder}
    with ExitStack() as stack:
        record = open_run(
            experiments,
            trainer="head",
            name=settings.name,
            params=about,
            data=(cached.version, "train"),
            headline=("accuracy", "max"),
        )
        folder = Path(settings.output) / f"head_{settings.name}"
        log_epoch = None
        if record is not None:
            stack.enter_context(record)
            folder = record.folder / "checkpoints"

            def log_epoch(step: int, line: dict[str, Any]) -> None:
                record.log("epoch", step, line)

        result = train_head(settings, cached, folder, log_epoch=log_epoch)
        if record is not None:
            record.log("held_out", result["best_epoch"], result)
            record.artefact(folder / "confusion.png")
    return {**result, "path": str(folder), "run": None if record is None else record.id}
