"""python -m scripts.extract_features --config config.yaml --features.encoder random:efficientnet_b0
[--features.jobs 3]

Encodes a warehouse's pictures into a published version of features, in small jobs that several
processes may share. Stopped or killed, run it again: it does what is left, then checks and
publishes the version under features.output_root.
"""

import time
from pathlib import Path
from typing import Any

from features.settings import FeatureSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log, progress
from warehouse.settings import BuildSettings

log = get_log("extract_features")


class Settings(CommandSettings):
    features: FeatureSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, Any]:
    from features.encoders import open_encoder
    from features.export import export_npz, export_queue
    from features.jobs import plan_features
    from utils.jobs.publish import publish_jobs
    from utils.jobs.run import open_queue, recover_jobs, run_jobs
    from warehouse import Warehouse
    from warehouse.write.publish import open_root, published

    features, start = settings.features, time.monotonic()
    source = Warehouse.open(features.warehouse or settings.build.output_root)
    encoder = open_encoder(
        features.encoder,
        size=features.size,
        seed=features.seed,
        offline=features.offline,
        ours=our_backbones(),
    )
    plan, load = plan_features(source, encoder, features)
    root = Path(features.output_root)
    open_root(root)
    manifest, done = published(root, plan.version), 0
    with open_queue(plan, Path(features.work)) as queue:
        if manifest is None:
            recover_jobs(plan, queue, root)
        left = 0 if manifest is not None else queue.left()
        if manifest is not None:
            log.info("already there: %s", plan.version)
        else:
            with progress(
                min(left, features.jobs or left), "jobs", f"encoding with {encoder.name}"
            ) as bar:
                done = run_jobs(plan, load, queue, root, limit=features.jobs, progress=bar.advance)
            left = queue.left()
            if not left:
                manifest = publish_jobs(plan, load, queue, root)
                left = queue.left()
        total = len(queue.rows())
        export_queue(queue, source, plan.version, features.job_size)
    if manifest is not None:
        log.info("finished: %d jobs checked and published as %s", total, plan.version)
        if features.export_npz:
            export_npz(Warehouse.open(root / plan.version), queue.path.parent)
        log.info("next: python -m scripts.train_head --head.features %s", root)
    else:
        log.info("%d of %d jobs left; next: the same command again", left, total)
    return {
        "version": plan.version,
        "path": str(root / plan.version) if manifest is not None else None,
        "digest": manifest.digest if manifest is not None else None,
        "jobs_done": total - left,
        "jobs_now": done,
        "jobs_left": left,
        "queue": str(queue.path),
        "random": encoder.random,
        "seconds": round(time.monotonic() - start, 3),
    }


def our_backbones() -> dict[str, Any]:
    from detector.backbone import detector_trunk
    from vqvae.image_encoder import vqvae_trunk

    return {"tiny": detector_trunk, "big": detector_trunk, "vqvae": vqvae_trunk}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
