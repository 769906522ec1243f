"""python -m scripts.train_vqvae --config config.yaml [--vqvae.quantizer fsq --vqvae.max_minutes 15]

Trains a vector-quantised autoencoder on a cube's warehouse, scoring the held-out blocks after each
epoch. Checkpoint, log.jsonl, curve.png and sheet.png go to vqvae.output. Several processes:
torchrun --nproc-per-node 2 -m scripts.train_vqvae ...
"""

import time
from pathlib import Path
from typing import Any

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.log import get_log
from utils.tracking.settings import ExperimentSettings
from vqvae.settings import VqvaeSettings
from warehouse.settings import BuildSettings

log = get_log("train_vqvae")


class Settings(CommandSettings):
    vqvae: VqvaeSettings
    loader: LoaderSettings
    build: BuildSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, Any]:
    from utils.loader import ChunkLoader
    from utils.training.loop import Trainer
    from utils.training.ranks import Ranks
    from vqvae.block_sampling import cube_features, drawn_blocks, held_out_split, make_sampler
    from vqvae.metrics import as_result
    from vqvae.task import VqvaeTask
    from warehouse import Warehouse

    vqvae = settings.vqvae
    ranks = Ranks.start(vqvae.device)
    try:
        start = time.monotonic()
        warehouse = Warehouse.open(vqvae.warehouse or settings.build.output_root)
        train = warehouse.split("train")
        features = cube_features(train)
        held_out = held_out_split(warehouse)
        task = VqvaeTask(
            vqvae,
            features,
            train.specs["data"].shape[1:4],
            drawn_blocks(train, vqvae.min_valid_share),
        )
        options = settings.loader.model_dump()
        order = {key: options.pop(key) for key in ("interleave", "chunks_per_batch")}
        sampler = make_sampler(
            train,
            vqvae.batch_size,
            vqvae.min_valid_share,
            sampling=vqvae.sampling,
            seed=vqvae.seed,
            rank=ranks.rank,
            world_size=ranks.count,
            **order,
        )
        scored_by = make_sampler(
            held_out,
            min(vqvae.batch_size, max(held_out.chunk_sizes)),
            vqvae.min_valid_share,
            shuffle=False,
        )
        with (
            ChunkLoader(train, sampler=sampler, **options) as batches,
            ChunkLoader(held_out, sampler=scored_by, **options) as scored,
        ):
            output = Path(vqvae.output or "checkpoints/vqvae")
            trainer = Trainer(
                task,
                vqvae,
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
        "checkpoint in %s; next: python -m scripts.compress_zarr --compress.checkpoint %s --compress.warehouse %s",
        output,
        output,
        warehouse.folder,
    )
    return {**as_result(result), "warehouse": warehouse.version, "held_out": held_out.name}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
