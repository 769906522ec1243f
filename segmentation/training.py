"""Train the U-Net on a version of patches.

This module only puts splits, loaders, task and training loop together, so that the task knows
nothing of files and the loop nothing of patches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segmentation.settings import SegmentSettings
from segmentation.task import SegmentTask
from utils.loader import ChunkLoader
from utils.loading.settings import LoaderSettings
from utils.loading.stores import bounded_memory_store
from utils.tracking.settings import ExperimentSettings
from utils.training.held_out import held_out_split
from utils.training.loop import Trainer
from warehouse.errors import StateError, TrainingError
from warehouse.read.version import Warehouse

__all__ = ["train_unet"]

KEPT = ("checkpoint", "epochs", "steps", "samples_per_second", "finished")


def train_unet(
    settings: SegmentSettings,
    loader: LoaderSettings,
    experiments: ExperimentSettings,
    patches: Warehouse,
) -> dict[str, Any]:
    """Train a U-Net on the patches with masks.

    Returns
    -------
    dict
        `checkpoint`, `finished`, `training_seconds` and other results of the training loop.

    Raises
    ------
    TrainingError
        No image with a mask is in the split `train`.
    StateError
        The checkpoint to be resumed is of other patches.
    """
    if "train" not in patches.splits:
        raise TrainingError(
            "no image with a mask is in the split train",
            where=settings.input_root,
            found=f"only {', '.join(patches.splits)}",
            remedy="add masks, or predict with --segment.checkpoint FOLDER",
        )
    train, held_out = patches.split("train"), held_out_split(patches, "patches")
    options = loader.model_dump()
    if options["store"] == "auto":
        # Not decoded into memory, nor mapped: patches of large images are many, and reading them is
        # nothing beside the U-Net. It was 3.41 GB instead of 1.02 GB for 20,000 x 20,000 pixels.
        options["store"] = bounded_memory_store(train, ["image", "mask"])
    # Neighbouring patches of one image are alike and stored together: batches of one chunk each
    # would be of a single image.
    mixed = {"chunks_per_batch": max(settings.chunks_per_batch, loader.chunks_per_batch)}
    # Held-out batches lie in one chunk each: a size that no chunk can fill makes the loader warn.
    scored_size = min(settings.batch_size, max(held_out.chunk_sizes))
    training = settings.training()
    channels = patches.manifest.arrays["image"].row[0]
    task = SegmentTask(training, channels=channels, classes=settings.classes)
    with (
        ChunkLoader(train, settings.batch_size, seed=settings.seed, **options | mixed) as batches,
        ChunkLoader(held_out, scored_size, shuffle=False, **options) as scored,
    ):
        output = Path(str(training.output))
        trainer = Trainer(task, training, batches, scored, output, experiments=experiments)
        try:
            result = trainer.run()
        except StateError as error:
            raise _with_remedy(error) from None
    kept = {key: result[key] for key in KEPT if key in result}
    return kept | {"training_seconds": result["seconds"]}


def _with_remedy(error: StateError) -> StateError:
    """The loader, whose state does not fit other patches, cannot know what its caller may do."""
    remedy = "choose another --segment.output, or predict with --segment.checkpoint"
    return StateError(
        error.what,
        where=error.where,
        expected=error.expected,
        found=error.found,
        remedy=error.remedy or remedy,
    )
