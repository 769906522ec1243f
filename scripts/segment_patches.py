"""python -m scripts.segment_patches --config config.yaml --segment.input_root FOLDER
[--segment.max_minutes 15]

Cuts large pictures into overlapping patches, trains a U-Net on those with masks, and stitches its
predictions back into whole masks, beside the truth in segment.output. Everything is in small jobs:
stopped or killed, run the same command again and it goes on.
"""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from scripts._command import run
from segmentation.settings import SegmentSettings
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.log import get_log, progress
from utils.tracking.settings import ExperimentSettings

log = get_log("segment_patches")


class Settings(CommandSettings):
    segment: SegmentSettings
    loader: LoaderSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, Any]:
    from segmentation.mask_results import peak_memory_gb, stitch_pictures
    from segmentation.patches import write_patch_manifest

    segment, start = settings.segment, time.monotonic()
    patches = cut(segment)
    manifest = write_patch_manifest(patches, segment.folder)
    log.info(
        "%s patches of %s; where they lie: %s",
        sum(len(patches.split(name)) for name in patches.splits),
        patches.version,
        manifest,
    )
    trained = {"checkpoint": segment.checkpoint} if segment.checkpoint else train(settings, patches)
    if not trained.get("finished", True):
        log.info("training is not finished; next: the same command again")
        return {
            **trained,
            "patches": patches.version,
            "dice": None,
            "iou": None,
            "masks": 0,
            "peak_memory_gb": peak_memory_gb(),
        }
    probabilities, left = predict(segment, patches, Path(trained["checkpoint"]))
    result = {
        **trained,
        "patches": patches.version,
        "patch_manifest": str(manifest),
        "jobs_left": left,
    }
    if probabilities is None:
        log.info("%d prediction jobs left; next: the same command again", left)
        return {**result, "dice": None, "iou": None, "masks": 0, "peak_memory_gb": peak_memory_gb()}
    with progress(None, "pictures", "stitching") as bar:
        done = stitch_pictures(
            patches,
            probabilities,
            segment.folder,
            blend=segment.blend,
            tolerance=segment.boundary_tolerance,
            progress=bar.advance,
        )
    scores = (
        done.scores.get("test") or done.scores.get("held_out") or done.scores.get("train") or {}
    )
    log.info("%d masks; look at %s", len(done.pictures), done.folder / "index.html")
    return {
        **result,
        **{key: scores.get(key) for key in ("dice", "iou", "boundary_f1")},
        "scores": done.scores,
        "masks": len(done.pictures),
        "path": str(done.folder),
        "peak_memory_gb": peak_memory_gb(),
        "seconds": round(time.monotonic() - start, 1),
    }


def cut(segment: Any) -> Any:
    from ingest.pictures.patches import PatchCutter, cut_versions, list_pictures, survey
    from segmentation.patches import patch_recipe, plan_patches
    from warehouse import Warehouse
    from warehouse.format.manifest import version_name
    from warehouse.write.publish import bake, open_root, published

    build, root = segment.build(), segment.folder / "patches"
    listing = list_pictures(build)
    log.info(
        "%d pictures and %d masks in %s",
        len(listing.pictures),
        len(listing.annotations),
        listing.root,
    )
    recipe = patch_recipe(listing.fingerprint, segment, cut_versions())
    version, _ = version_name(recipe)
    open_root(root)
    if published(root, version) is not None:
        log.info("already cut: %s", version)
        return told(Warehouse.open(root / version))

    def make_plan(unreadable: dict[str, Any]) -> Any:
        found = survey(listing, build, least=segment.patch_size, unreadable=unreadable)
        return plan_patches(
            found.parents,
            recipe,
            channels=segment.channels or (1 if found.grey else 3),
            found=found.found,
            rejected=found.rejected,
            warnings=found.warnings,
        )

    def cutter(plan: Any) -> PatchCutter:
        return PatchCutter(
            listing.root, plan.splits[0].specs[0].shape[1], build.mask_values, build.max_pixels
        )

    with ExitStack() as stack:

        def on_plan(plan: Any) -> Any:
            return stack.enter_context(
                progress(plan.samples, "patches", f"cutting {plan.version}")
            ).advance

        # In this process, one after another: that is what keeps each picture decoded once, and one
        # in memory.
        bake(make_plan, cutter, root, workers=0, cluster=None, trace=True, on_plan=on_plan)
    return told(Warehouse.open(root / version))


def told(patches: Any) -> Any:
    """What a version of patches has to say about itself goes to the log, newly cut or not."""
    for line in patches.manifest.warnings:
        log.warning("%s", line)
    if patches.manifest.rejected:
        log.warning(
            "%d pictures are left out; %s says why",
            patches.manifest.rejected,
            patches.folder / "rejected.jsonl",
        )
    return patches


def train(settings: Settings, patches: Any) -> dict[str, Any]:
    from segmentation.task import SegmentTask
    from utils.loader import ChunkLoader
    from utils.loading.stores import bounded_memory_store
    from utils.training.loop import Trainer
    from warehouse.errors import StateError, TrainingError

    segment = settings.segment
    if "train" not in patches.splits:
        raise TrainingError(
            "no picture with a mask is in the split train",
            where=segment.input_root,
            found=f"only {', '.join(patches.splits)}",
            remedy="add masks, or predict with --segment.checkpoint FOLDER",
        )
    training = segment.training()
    options, split = settings.loader.model_dump(), patches.split("train")
    if options["store"] == "auto":
        # Not decoded into memory, nor mapped: patches of large pictures are many, and reading them
        # is nothing beside the U-Net.
        options["store"] = bounded_memory_store(split, ["image", "mask"])
    mixed = {"chunks_per_batch": max(segment.chunks_per_batch, options["chunks_per_batch"])}
    held_out = patches.split(
        next((name for name in ("val", "test") if name in patches.splits), "train")
    )
    task = SegmentTask(
        training, channels=patches.manifest.arrays["image"]["row"][0], classes=segment.classes
    )
    with (
        ChunkLoader(split, segment.batch_size, seed=segment.seed, **options | mixed) as batches,
        ChunkLoader(
            held_out, min(segment.batch_size, max(held_out.chunk_sizes)), shuffle=False, **options
        ) as scored,
    ):
        trainer = Trainer(
            task, training, batches, scored, Path(training.output), book=settings.experiments
        )
        try:
            result = trainer.run()
        except StateError as error:
            # The loader, whose state does not fit other patches, does not know what its caller can
            # be told to do.
            remedy = (
                error.remedy
                or "choose another --segment.output, or predict with --segment.checkpoint"
            )
            raise StateError(
                error.what,
                where=error.where,
                expected=error.expected,
                found=error.found,
                remedy=remedy,
            ) from None
    kept = ("checkpoint", "epochs", "steps", "samples_per_second", "finished")
    return {key: result[key] for key in kept if key in result} | {
        "training_seconds": result["seconds"]
    }


def predict(segment: Any, patches: Any, folder: Path) -> tuple[Path | None, int]:
    from segmentation.mask_jobs import plan_probabilities
    from segmentation.mask_results import stitched_paths
    from segmentation.unet import restore_unet
    from utils.jobs.publish import publish_jobs
    from utils.jobs.run import open_queue, recover_jobs, run_jobs
    from utils.training.checkpoint import load_checkpoint
    from utils.training.ranks import choose_device
    from warehouse.write.publish import open_root, published

    checkpoint = load_checkpoint(folder)
    plan, load = plan_probabilities(
        patches,
        restore_unet(checkpoint),
        checkpoint,
        segment.batch_size,
        choose_device(segment.device),
    )
    root = segment.folder / "probabilities"
    open_root(root)
    if published(root, plan.version) is not None:
        return root / plan.version, 0
    if all(
        path.exists()
        for path in stitched_paths(patches, segment.folder, plan.version, segment.blend).values()
    ):
        log.info(
            "every picture is stitched: the probabilities, which are not there, are not predicted again"
        )
        return root / plan.version, 0
    with open_queue(plan, segment.folder / "jobs") as queue:
        recover_jobs(plan, queue, root)
        left = queue.left()
        with progress(min(left, segment.jobs or left), "jobs", "predicting") as bar:
            run_jobs(plan, load, queue, root, limit=segment.jobs, progress=bar.advance)
        if not queue.left():
            publish_jobs(plan, load, queue, root)
        left = queue.left()
    return (None, left) if left else (root / plan.version, 0)


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
