"""python -m scripts.train_detector --config config.yaml [--detector.model big --detector.epochs 20]

Trains TinyDet or BigDet from a warehouse, scoring the held-out split after each epoch. Checkpoint,
log.jsonl and curve.png go to detector.output. Several processes: torchrun --nproc-per-node 2 -m
scripts.train_detector ...
"""

import time
from pathlib import Path
from typing import Any

from detector.settings import DetectorSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.log import get_log
from utils.tracking.settings import ExperimentSettings
from warehouse.settings import BuildSettings

log = get_log("train_detector")


class Settings(CommandSettings):
    detector: DetectorSettings
    loader: LoaderSettings
    build: BuildSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, Any]:
    from detector.task import DetectorTask, data_facts
    from utils.loader import ChunkLoader
    from utils.training.loop import Trainer
    from utils.training.ranks import Ranks
    from warehouse import Warehouse

    detector = settings.detector
    ranks = Ranks.start(detector.device)
    try:
        start = time.monotonic()
        warehouse = Warehouse.open(detector.warehouse or settings.build.output_root)
        train = warehouse.split("train")
        held_out = warehouse.split(held_out_name(warehouse))
        task = DetectorTask(detector, data_facts(train, detector))
        if (
            detector.model == "tiny"
            and int(train.array("box_mask")[:].sum(axis=1).max(initial=0)) > 1
        ):
            log.warning(
                "TinyDet finds one box a picture and learns the largest; --detector.model big finds them all"
            )
        options = settings.loader.model_dump()
        with (
            ChunkLoader(
                train,
                detector.batch_size,
                seed=detector.seed,
                rank=ranks.rank,
                world_size=ranks.count,
                **options,
            ) as batches,
            ChunkLoader(
                held_out,
                min(detector.batch_size, max(held_out.chunk_sizes)),
                shuffle=False,
                **options,
            ) as scored,
        ):
            output = Path(detector.output or f"checkpoints/{detector.model}det")
            trainer = Trainer(
                task,
                detector,
                batches,
                scored,
                output,
                ranks=ranks,
                open_seconds=time.monotonic() - start,
                book=settings.experiments,
            )
            result = trainer.run()
    finally:
        ranks.close()
    log.info(
        "checkpoint in %s; next: python -m scripts.infer_view --infer.checkpoint %s --infer.input %s",
        output,
        output,
        warehouse.folder,
    )
    return {**result, "warehouse": warehouse.version, "held_out": held_out.name}


def held_out_name(warehouse: Any) -> str:
    """`val`, else `test`, else `train`, whichever has pictures first."""
    sizes = {name: len(warehouse.split(name)) for name in warehouse.splits}
    name = next((name for name in ("val", "test") if sizes.get(name)), "train")
    if name != "val":
        log.warning("the warehouse has no val pictures: scoring on %s", name)
    return name


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
