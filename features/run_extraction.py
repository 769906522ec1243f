"""Extract features: plan, do the jobs that are left, and publish when all of them are done.

A run may stop after any job; the next one goes on with the same queue.
"""

from __future__ import annotations

from pathlib import Path

from features.encoders.network import NetworkEncoder
from features.export import export_npz, export_queue
from features.feature_jobs import plan_features
from features.settings import FeatureSettings
from utils.jobs.derive import derive_version
from utils.jobs.run import open_queue
from utils.log import get_log
from warehouse.read.version import Warehouse
from warehouse.write.publish import open_root

__all__ = ["extract_features"]

log = get_log(__name__)


def extract_features(
    source: Warehouse, encoder: NetworkEncoder, settings: FeatureSettings
) -> dict[str, object]:
    """Do at most `settings.jobs` jobs, and publish the version once no job is left.

    Returns
    -------
    dict
        The result of `extract_features`; `path` and `digest` are None while jobs are left.
    """
    plan, load = plan_features(source, encoder, settings)
    root = Path(settings.output_root)
    open_root(root)
    # Opened even if the version exists: the exports are made from the queue.
    with open_queue(plan, Path(settings.work)) as queue:
        derived = derive_version(
            plan, load, queue, root, verb=f"encoding with {encoder.name}", limit=settings.jobs
        )
        total = len(queue.rows())
        export_queue(queue, source, plan.version, settings.job_size)

    folder = root / plan.version
    manifest = derived.manifest
    if manifest is None:
        log.info("%d of %d jobs are left; next: run the same command again", derived.left, total)
    else:
        log.info("finished: %d jobs checked and published as %s", total, plan.version)
        if settings.export_npz:
            export_npz(Warehouse.open(folder), queue.path.parent)
        log.info("next: python -m scripts.train_head --head.features %s", root)
    return {
        "version": plan.version,
        "path": None if manifest is None else str(folder),
        "digest": None if manifest is None else manifest.digest,
        "jobs_done": total - derived.left,
        "jobs_now": derived.done,
        "jobs_left": derived.left,
        "queue": str(queue.path),
        "random": encoder.random,
    }
