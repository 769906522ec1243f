"""python -m scripts.train_head --config config.yaml [--head.features FOLDER --head.epochs 50]

Trains heads on a published version of features, one after another as head.ablations says, and
compares them on the held-out split. Every run has its checkpoint and confusion matrix under
head.output, and its figures in the experiment book. With head.checkpoint a trained head is scored
instead.
"""

from pathlib import Path
from typing import Any

from features.settings import FeatureSettings, HeadSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log
from utils.tracking.settings import ExperimentSettings

log = get_log("train_head")


class Settings(CommandSettings):
    head: HeadSettings
    features: FeatureSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, Any]:
    from features.head import ablated, read_cached, train_head
    from warehouse import Warehouse

    head = settings.head
    if head.checkpoint:
        return score_trained(settings)
    warehouse = Warehouse.open(head.features or settings.features.output_root)
    wanted = ablated(head)
    cached = read_cached(warehouse, spatial=any(one.kind == "attention" for one in wanted))
    name, random = cached.encoder["name"], " (random weights)" if cached.encoder["random"] else ""
    count = sum(map(len, cached.pooled.values()))
    log.info(
        "%d features by %s%s, %.1f MB in memory, scored on %s",
        count,
        name,
        random,
        cached.megabytes,
        cached.held_out,
    )
    runs = []
    for one in wanted:
        runs.append(train_one(train_head, one, cached, settings.experiments))
        log.info(
            "%-16s accuracy %.3f  macro F1 %.3f  %.1f s",
            one.name,
            runs[-1]["accuracy"],
            runs[-1]["macro_f1"],
            runs[-1]["seconds"],
        )
    # Chosen by the split that chose the epochs: the held-out one only tells.
    best = max(runs, key=lambda result: result["selection_accuracy"])
    log.info("best: %s in %s; next: python -m scripts.inspect_runs", best["name"], best["path"])
    return {
        "runs": runs,
        "best": best["name"],
        "features": warehouse.version,
        "encoder": name,
        "random": cached.encoder["random"],
    }


def score_trained(settings: Settings) -> dict[str, Any]:
    from features.head import read_cached
    from features.head_score import check_same_features, score_head
    from utils.training.checkpoint import load_checkpoint
    from warehouse import Warehouse

    head, checkpoint = settings.head, load_checkpoint(Path(settings.head.checkpoint))
    warehouse = Warehouse.open(head.features or settings.features.output_root)
    cached = read_cached(
        warehouse, spatial=checkpoint.meta.get("model", {}).get("kind") == "head-attention"
    )
    check_same_features(checkpoint, cached, other_pictures=head.other_pictures)
    result = score_head(checkpoint, cached, Path(head.output) / f"confusion_{cached.version}.png")
    log.info(
        "%s: accuracy %.3f on %s in %.0f ms; next: python -m scripts.inspect_runs",
        result["name"],
        result["accuracy"],
        result["held_out"],
        1e3 * result["seconds"],
    )
    about = {"encoder": cached.encoder["name"], "random": cached.encoder["random"]}
    return {"runs": [result], "best": result["name"], "features": warehouse.version, **about}


def train_one(train_head: Any, one: Any, cached: Any, experiments: Any) -> dict[str, Any]:
    from contextlib import ExitStack

    from utils.tracking.experiments import open_run

    with ExitStack() as stack:
        about = one.model_dump(mode="json", exclude={"ablations"}) | {"encoder": cached.encoder}
        book = open_run(
            experiments,
            trainer="head",
            name=one.name,
            params=about,
            data=(cached.version, "train"),
            headline=("accuracy", "max"),
        )
        folder = Path(one.output) / f"head_{one.name}"
        if book is not None:
            stack.enter_context(book)
            folder = book.folder / "checkpoints"
        result = train_head(
            one,
            cached,
            folder,
            log_epoch=None if book is None else lambda step, line: book.log("epoch", step, line),
        )
        if book is not None:
            book.log("held_out", result["best_epoch"], result)
            book.artefact(folder / "confusion.png")
    return {**result, "path": str(folder), "run": None if book is None else book.id}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
