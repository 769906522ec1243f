"""Training a VQ-VAE on a cube: splits, samplers, loaders, task and loop put together."""

from __future__ import annotations

import time
from pathlib import Path

from utils.loader import ChunkLoader
from utils.loading.settings import LoaderSettings
from utils.log import get_log
from utils.samplers import BatchSampler
from utils.tracking.settings import ExperimentSettings
from utils.training.held_out import held_out_split
from utils.training.loop import Trainer
from utils.training.ranks import Ranks
from vqvae.block_sampling import cube_features, drawn_blocks, make_sampler
from vqvae.metrics import as_result
from vqvae.settings import VqvaeSettings
from vqvae.task import VqvaeTask
from warehouse.read.version import Split, Warehouse

__all__ = ["train_vqvae"]

log = get_log(__name__)


def train_vqvae(
    settings: VqvaeSettings,
    loader: LoaderSettings,
    experiments: ExperimentSettings,
    location: str,
    ranks: Ranks,
) -> dict[str, object]:
    """Train on the cube at `location`, scoring its held-out blocks.

    Returns
    -------
    dict
        The result of the training loop, with the names `warehouse` and `held_out`.
    """
    start = time.monotonic()
    warehouse = Warehouse.open(location)
    train = warehouse.split("train")
    features = cube_features(train)
    held_out = held_out_split(warehouse, "blocks")
    # Before the model exists: its weights begin as the principal components of these blocks.
    blocks = drawn_blocks(train, settings.min_valid_share)
    task = VqvaeTask(settings, features, train.specs["data"].shape[1:4], blocks)

    # The order is that of the samplers here, which leave out blocks without enough valid voxels.
    options = loader.model_dump(exclude={"interleave", "chunks_per_batch"})
    sampler = _training_sampler(train, settings, loader, ranks)
    scored_by = make_sampler(
        held_out,
        # A batch lies within a stored chunk, so that larger ones would only be warned of.
        min(settings.batch_size, max(held_out.chunk_sizes)),
        settings.min_valid_share,
        shuffle=False,
    )
    output = Path(settings.output or "checkpoints/vqvae")
    with (
        ChunkLoader(train, sampler=sampler, **options) as batches,
        ChunkLoader(held_out, sampler=scored_by, **options) as scored,
    ):
        trainer = Trainer(
            task,
            settings,
            batches,
            scored,
            output,
            ranks=ranks,
            open_seconds=time.monotonic() - start,
            experiments=experiments,
        )
        result = trainer.run()
    log.info(
        "checkpoint in %s; next: python -m scripts.compress_zarr --compress.checkpoint %s"
        " --compress.warehouse %s",
        output,
        output,
        warehouse.folder,
    )
    # The names say what the figures are of: they cannot be compared between versions or splits.
    return {**as_result(result), "warehouse": warehouse.version, "held_out": held_out.name}


def _training_sampler(
    train: Split, settings: VqvaeSettings, loader: LoaderSettings, ranks: Ranks
) -> BatchSampler:
    return make_sampler(
        train,
        settings.batch_size,
        settings.min_valid_share,
        sampling=settings.sampling,
        seed=settings.seed,
        rank=ranks.rank,
        world_size=ranks.count,
        interleave=loader.interleave,
        chunks_per_batch=loader.chunks_per_batch,
    )
