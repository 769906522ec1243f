"""python -m scripts.finetune --config config.yaml --finetune.encoder random:efficientnet_b0
[--finetune.blocks 4 --finetune.max_minutes 10]

Trains an encoder's last blocks and a head on a warehouse of pictures with classes, within a budget
of memory. Stopped, killed or out of minutes, run the same command again and it goes on. What it
leaves in finetune.output is an encoder for extract_features.
"""

import time
from contextlib import ExitStack
from typing import Any

from features.settings import FinetuneSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.log import get_log
from utils.tracking.settings import ExperimentSettings
from warehouse.settings import BuildSettings

log = get_log("finetune")


class Settings(CommandSettings):
    finetune: FinetuneSettings
    loader: LoaderSettings
    build: BuildSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, Any]:
    from features.encoders import open_encoder
    from features.finetune import FinetuneTask, checkpoint_of
    from features.pictures import picture_targets
    from utils.loader import ChunkLoader
    from utils.loading.stores import bounded_memory_store
    from utils.training.loop import Trainer
    from utils.training.memory_budget import MemoryBudget
    from utils.training.ranks import Ranks
    from warehouse import Warehouse
    from warehouse.errors import ConfigError

    finetune, start = settings.finetune, time.monotonic()
    finetune.require_other_encoder()
    ranks = Ranks.start(finetune.device)
    if ranks.count > 1:
        raise ConfigError(
            "fine-tuning on a budget runs in one process", where="WORLD_SIZE", found=ranks.count
        )
    # Before anything is put on a GPU.
    budget = MemoryBudget(finetune.memory_budget_gb, ranks.device)
    warehouse = Warehouse.open(finetune.warehouse or settings.build.output_root)
    targets = picture_targets(warehouse, finetune.picture_label)
    selection = "val" if "val" in targets else "train"
    final = "test" if "test" in targets else selection
    encoder = open_encoder(
        finetune.encoder,
        size=finetune.size,
        seed=finetune.seed,
        offline=finetune.offline,
        ours=our_backbones(),
    )
    training = finetune.training()
    with ExitStack() as stack:

        def batches(name: str, **options: Any) -> Any:
            split = warehouse.split(name)
            size = min(finetune.batch_size, max(split.chunk_sizes))
            kept = settings.loader.model_dump()
            if kept["store"] == "auto":
                # Not decoded into memory, nor mapped: on a CPU the budget counts all that the
                # process holds.
                kept["store"] = bounded_memory_store(split, ["image"])
            return stack.enter_context(ChunkLoader(split, size, arrays=["image"], **kept | options))

        train = batches("train", seed=finetune.seed)
        last = (
            None if final == selection else (final, batches(final, shuffle=False), targets[final])
        )
        steps = -(-min(len(train), finetune.limit_batches or len(train)) // finetune.accumulate)
        task = FinetuneTask(
            training,
            encoder,
            warehouse.manifest.class_names,
            (targets["train"], targets[selection]),
            steps=steps,
            folder=finetune.folder,
            final=last,
            save_memory=finetune.recompute,
        )
        log.info(
            "%s: %d of %d parameters are trained with the head",
            encoder.name,
            sum(one.numel() for one in task.tuned),
            sum(one.numel() for one in encoder.network.parameters()),
        )
        trainer = Trainer(
            task,
            training,
            train,
            batches(selection, shuffle=False),
            finetune.folder / "training",
            ranks=ranks,
            open_seconds=time.monotonic() - start,
            book=settings.experiments,
            budget=budget,
            save_steps=finetune.save_steps,
        )
        result = trainer.run()
    checkpoint = checkpoint_of(finetune.folder)
    log.info(
        "peak memory %.2f GB of %s",
        budget.peak_gb,
        f"{finetune.memory_budget_gb:g}" if finetune.memory_budget_gb else "no limit",
    )
    if result["finished"]:
        log.info(
            "accuracy %.3f on %s; next: python -m scripts.extract_features --features.encoder %s",
            result["accuracy"],
            final,
            checkpoint,
        )
    else:
        log.info(
            "next: %s",
            "the same command again"
            if finetune.resume
            else "the same command with --finetune.resume true",
        )
    return {
        **result,
        "checkpoint": str(checkpoint),
        "peak_memory_gb": budget.peak_gb,
        "micro_batch": -(-finetune.batch_size // trainer.pieces),
        "held_out": final if result["finished"] else selection,
        "warehouse": warehouse.version,
        "encoder": encoder.name,
        "blocks": finetune.blocks,
    }


def our_backbones() -> dict[str, Any]:
    from detector.backbone import detector_trunk
    from vqvae.image_encoder import vqvae_trunk

    return {"tiny": detector_trunk, "big": detector_trunk, "vqvae": vqvae_trunk}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
