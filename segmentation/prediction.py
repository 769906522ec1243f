"""Predict probabilities for all patches in small jobs, and choose the scores that a run reports."""

from __future__ import annotations

from pathlib import Path

from segmentation.mask_jobs import plan_probabilities
from segmentation.mask_results import Stitched, stitched_paths
from segmentation.settings import SegmentSettings
from segmentation.unet import restore_unet
from utils.jobs.derive import derive_version
from utils.jobs.run import open_queue
from utils.log import get_log
from utils.training.checkpoint import load_checkpoint
from utils.training.ranks import choose_device
from warehouse.read.version import Warehouse
from warehouse.write.publish import open_root, published

__all__ = ["predict_patches", "reported_scores"]

log = get_log(__name__)


def predict_patches(
    settings: SegmentSettings, patches: Warehouse, checkpoint_folder: Path
) -> tuple[Path | None, int]:
    """Predict the probabilities of all patches with a trained U-Net.

    Returns
    -------
    tuple
        The folder of the version of probabilities, None while jobs are left; and the number of
        jobs left.
    """
    checkpoint = load_checkpoint(checkpoint_folder)
    plan, load = plan_probabilities(
        patches,
        restore_unet(checkpoint),
        checkpoint,
        settings.batch_size,
        choose_device(settings.device),
    )
    root = settings.folder / "probabilities"
    folder = root / plan.version
    open_root(root)
    if published(root, plan.version) is not None:
        return folder, 0
    stitched = stitched_paths(patches, settings.folder, plan.version, settings.blend)
    if all(path.exists() for path in stitched.values()):
        # Probabilities are large, and people delete them once the masks are stitched.
        log.info("every image is stitched already, so nothing is predicted again")
        return folder, 0
    with open_queue(plan, settings.folder / "jobs") as queue:
        derived = derive_version(plan, load, queue, root, verb="predicting", limit=settings.jobs)
    return (None if derived.left else folder), derived.left


def reported_scores(done: Stitched) -> dict[str, float | None]:
    """Return Dice, IoU and boundary F1 of `test`, else of all held-out images, else of `train`."""
    # The fairest split that has masks: val has chosen the epoch, train has made the weights.
    splits = ("test", "held_out", "train")
    scored = [done.scores[name] for name in splits if done.scores.get(name)]
    scores: dict[str, float] = scored[0] if scored else {}
    return {key: scores.get(key) for key in ("dice", "iou", "boundary_f1")}
