"""Training a detector on a warehouse: its splits, loaders, task and the training loop."""

from __future__ import annotations

import time
from pathlib import Path

from detector.settings import DetectorSettings
from detector.task import DetectorTask, data_facts
from utils.loader import ChunkLoader
from utils.loading.settings import LoaderSettings
from utils.log import get_log
from utils.tracking.settings import ExperimentSettings
from utils.training.held_out import held_out_split
from utils.training.loop import Trainer
from utils.training.ranks import Ranks
from warehouse.read.version import Split, Warehouse

__all__ = ["train_detector"]

log = get_log(__name__)


def train_detector(
    settings: DetectorSettings,
    loader: LoaderSettings,
    experiments: ExperimentSettings,
    location: str,
    ranks: Ranks,
) -> dict[str, object]:
    """Train a detector on a warehouse, and score it on the held-out split.

    Parameters
    ----------
    settings
        What is trained, on what, and for how long.
    loader
        Settings of the loaders of both splits.
    experiments
        Where the run is recorded.
    location
        The warehouse, or one of its versions.
    ranks
        This process among those that train together.

    Returns
    -------
    dict
        The result of the training loop, with the names `warehouse` and `held_out`.
    """
    start = time.monotonic()
    warehouse = Warehouse.open(location)
    train = warehouse.split("train")
    held_out = held_out_split(warehouse, "pictures")
    task = DetectorTask(settings, data_facts(train, settings))
    _warn_of_more_boxes(train, settings)

    options = loader.model_dump()
    # A held-out split may be smaller than a batch, which a loader refuses.
    scored_size = min(settings.batch_size, max(held_out.chunk_sizes))
    with (
        ChunkLoader(
            train,
            settings.batch_size,
            seed=settings.seed,
            rank=ranks.rank,
            world_size=ranks.count,
            **options,
        ) as batches,
        ChunkLoader(held_out, scored_size, shuffle=False, **options) as scored,
    ):
        result = Trainer(
            task,
            settings,
            batches,
            scored,
            _output_of(settings),
            ranks=ranks,
            open_seconds=time.monotonic() - start,
            experiments=experiments,
        ).run()
    _log_next_step(_output_of(settings), warehouse)
    return {**result, "warehouse": warehouse.version, "held_out": held_out.name}


def _output_of(settings: DetectorSettings) -> Path:
    return Path(settings.output or f"checkpoints/{settings.model}det")


def _log_next_step(output: Path, warehouse: Warehouse) -> None:
    log.info(
        "checkpoint in %s; next: python -m scripts.infer_view --infer.checkpoint %s"
        " --infer.input %s",
        output,
        output,
        warehouse.folder,
    )


def _warn_of_more_boxes(train: Split, settings: DetectorSettings) -> None:
    if settings.model != "tiny":
        return
    # Not refused: the largest box may be just what is wanted.
    if int(train.array("box_mask")[:].sum(axis=1).max(initial=0)) > 1:
        log.warning(
            "TinyDet finds one box per picture and learns the largest;"
            " --detector.model big finds them all"
        )
