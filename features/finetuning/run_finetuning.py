"""Fine-tuning an encoder: splits, loaders, memory budget, task and loop put together."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from features.encoders.network import NetworkEncoder
from features.finetuning.finetune_task import FinetuneTask, checkpoint_of
from features.finetuning.settings import FinetuneSettings
from features.image_labels import picture_targets
from utils.loader import ChunkLoader
from utils.loading.settings import LoaderSettings
from utils.loading.stores import bounded_memory_store
from utils.log import get_log
from utils.tracking.settings import ExperimentSettings
from utils.training.held_out import selection_and_final
from utils.training.loop import Trainer
from utils.training.memory_budget import MemoryBudget
from utils.training.ranks import Ranks
from warehouse.errors import ConfigError
from warehouse.read.version import Warehouse

__all__ = ["finetune"]

log = get_log(__name__)


def finetune(
    settings: FinetuneSettings,
    loader: LoaderSettings,
    experiments: ExperimentSettings,
    location: str,
    open_encoder: Callable[[], NetworkEncoder],
) -> dict[str, Any]:
    """Fine-tune an encoder on the pictures of the warehouse at `location`.

    `open_encoder` is called after the memory budget is set up, since the encoder counts towards it.
    Raises ConfigError if several processes were started or the encoder would be overwritten.
    """
    start = time.monotonic()
    settings.require_other_encoder()
    ranks = _one_process(settings.device)
    # Before anything is put on a GPU.
    budget = MemoryBudget(settings.memory_budget_gb, ranks.device)
    warehouse = Warehouse.open(location)
    targets = picture_targets(warehouse, settings.picture_label)
    selection, final = selection_and_final(targets)
    encoder = open_encoder()
    training = settings.training()
    with ExitStack() as stack:

        def batches(name: str, **order: Any) -> ChunkLoader:
            return stack.enter_context(_open_loader(warehouse, name, settings, loader, order))

        train = batches("train", seed=settings.seed)
        last = None
        if final != selection:
            last = (final, batches(final, shuffle=False), targets[final])
        task = FinetuneTask(
            training,
            encoder,
            warehouse.manifest.class_names,
            (targets["train"], targets[selection]),
            steps=_steps_per_epoch(len(train), settings),
            folder=settings.folder,
            final=last,
            save_memory=settings.recompute,
        )
        _report_parameters(task, encoder)
        trainer = Trainer(
            task,
            training,
            train,
            batches(selection, shuffle=False),
            settings.folder / "training",
            ranks=ranks,
            open_seconds=time.monotonic() - start,
            experiments=experiments,
            budget=budget,
            save_steps=settings.save_steps,
        )
        result = trainer.run()
    _report(result, settings, budget, final)
    held_out = final if result["finished"] else selection
    details = {"warehouse": warehouse.version, "held_out": held_out, "encoder": encoder.name}
    return {**result, **details, **_limits(settings, budget, trainer)}


def _one_process(device: str) -> Ranks:
    ranks = Ranks.start(device)
    # The budget counts one process; every rank would hold a model of its own.
    if ranks.count > 1:
        raise ConfigError(
            "fine-tuning on a budget runs in one process", where="WORLD_SIZE", found=ranks.count
        )
    return ranks


def _report_parameters(task: FinetuneTask, encoder: NetworkEncoder) -> None:
    log.info(
        "%s: %d of %d parameters are trained with the head",
        encoder.name,
        sum(one.numel() for one in task.tuned),
        sum(one.numel() for one in encoder.network.parameters()),
    )


def _steps_per_epoch(batches: int, settings: FinetuneSettings) -> int:
    return -(-min(batches, settings.limit_batches or batches) // settings.accumulate)


def _limits(
    settings: FinetuneSettings, budget: MemoryBudget, trainer: Trainer
) -> dict[str, object]:
    """What was trained within which limits, and where it lies."""
    return {
        "checkpoint": str(checkpoint_of(settings.folder)),
        "peak_memory_gb": budget.peak_gb,
        "micro_batch": -(-settings.batch_size // trainer.state.micro_batches),
        "blocks": settings.blocks,
    }


def _open_loader(
    warehouse: Warehouse,
    name: str,
    settings: FinetuneSettings,
    loader: LoaderSettings,
    order: dict[str, Any],
) -> ChunkLoader:
    split = warehouse.split(name)
    size = min(settings.batch_size, max(split.chunk_sizes))
    options = loader.model_dump() | order
    if options["store"] == "auto":
        # Not decoded into memory, nor mapped: on a CPU the budget counts what the process holds.
        options["store"] = bounded_memory_store(split, ["image"])
    return ChunkLoader(split, size, arrays=["image"], **options)


def _report(
    result: dict[str, Any], settings: FinetuneSettings, budget: MemoryBudget, final: str
) -> None:
    limit = f"{settings.memory_budget_gb:g}" if settings.memory_budget_gb else "no limit"
    log.info("peak memory %.2f GB of %s", budget.peak_gb, limit)
    if result["finished"]:
        log.info(
            "accuracy %.3f on %s; next: python -m scripts.extract_features --features.encoder %s",
            result["accuracy"],
            final,
            checkpoint_of(settings.folder),
        )
    elif settings.resume:
        log.info("next: the same command again")
    else:
        log.info("next: the same command with --finetune.resume true")
