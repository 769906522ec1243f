"""python -m scripts.build_zarr --config config.yaml --build.input_root FOLDER [--build.key value]

Builds a published, checksummed Zarr version from a folder of labelled images or, with
--build.format raster, from a time series of rasters, and updates CURRENT. Rebuilding unchanged data
returns immediately. If a build is interrupted, run the same command again to resume it.
"""

import time
from pathlib import Path

from ingest.rasters.settings import RasterSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log
from warehouse.settings import BuildSettings

log = get_log("build_zarr")


class Settings(CommandSettings):
    build: BuildSettings
    raster: RasterSettings


def main(settings: Settings) -> dict[str, object]:
    from ingest.building import dry_run, worker_count
    from ingest.jobs import open_job
    from utils.jobs.bake_version import bake_with_progress
    from warehouse.format.manifest import version_name
    from warehouse.write.publish import open_root, published

    build, start = settings.build, time.monotonic()
    root = Path(build.output_root)
    clear = build.if_exists == "clear"
    job = open_job(build, settings.raster)
    log.info("%s", job.found)

    version, _ = version_name(job.recipe)
    manifest = None if clear else published(root, version)
    if manifest is not None:
        log.info("already built: %s; --build.if_exists clear builds it again", version)
    elif build.dry_run:
        return dry_run(job, build)
    else:
        open_root(root)
        manifest = bake_with_progress(
            job.plan,
            job.loader,
            root,
            noun=job.noun,
            describe=lambda plan: plan.layout.summary_lines(plan.summary),
            workers=worker_count(build),
            cluster=build.cluster,
            trace=build.trace,
            clear=clear,
            preload=job.preload,
            threads=job.threads,
        )

    inspect = f"python -m scripts.inspect_zarr --inspect.path {root}"
    log.info("next: %s, python -m scripts.%s %s", inspect, job.trainer, root)
    return {
        "version": version,
        "path": str(root / version),
        "found": manifest.found,
        "kept": manifest.kept,
        "rejected": manifest.rejected,
        "splits": {name: info.samples for name, info in manifest.splits.items()},
        "digest": manifest.digest,
        "seconds": round(time.monotonic() - start, 3),
    }


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
