"""python -m scripts.build_zarr --config config.yaml --build.input_root FOLDER [--build.key value]

Bakes a folder of labelled pictures, or with --build.format raster a stack of rasters, into a
published, checksummed Zarr version and makes CURRENT name it. Run again, it says that the version
is there; killed, it goes on where it stopped.
"""

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ingest.rasters.settings import RasterSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log, progress
from warehouse.settings import BuildSettings

log = get_log("build_zarr")


class Settings(CommandSettings):
    build: BuildSettings
    raster: RasterSettings


def main(settings: Settings) -> dict[str, Any]:
    from ingest.jobs import open_job
    from warehouse.format.manifest import version_name
    from warehouse.write.publish import open_root, published

    build, start = settings.build, time.monotonic()
    root = Path(build.output_root)
    job = open_job(build, settings.raster)
    log.info(job.found)
    version, _ = version_name(job.recipe)
    manifest = None if build.if_exists == "clear" else published(root, version)
    if manifest is not None:
        log.info(f"already built: {version}; --build.if_exists clear builds it again")
    elif build.dry_run:
        return dry_run(job, build)
    else:
        open_root(root)
        manifest = bake_job(job, build, root)
    log.info(
        f"next: python -m scripts.inspect_zarr --inspect.path {root}, python -m scripts.{job.trainer} {root}"
    )
    return {
        "version": version,
        "path": str(root / version),
        "found": manifest.found,
        "kept": manifest.kept,
        "rejected": manifest.rejected,
        "splits": {name: info["samples"] for name, info in manifest.splits.items()},
        "digest": manifest.digest,
        "seconds": round(time.monotonic() - start, 3),
    }


def bake_job(job: Any, build: Any, root: Path) -> Any:
    from warehouse.inspect.report import summary_lines
    from warehouse.write.publish import bake

    with ExitStack() as stack:

        def on_plan(plan: Any) -> Any:
            for line in summary_lines(plan.summary):
                log.info(line)
            return stack.enter_context(
                progress(plan.samples, job.noun, f"baking {plan.version}")
            ).advance

        return bake(
            job.plan,
            job.loader,
            root,
            workers=cores() if build.workers is None else build.workers,
            cluster=build.cluster,
            trace=build.trace,
            on_plan=on_plan,
            clear=build.if_exists == "clear",
            warm_up=job.warm_up,
            threads=job.threads,
        )


def cores() -> int:
    """Cores this process may use; the affinity mask is Linux's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dry_run(job: Any, build: Any) -> dict[str, Any]:
    from warehouse.inspect.report import rejected_lines, summary_lines
    from warehouse.write.bake import estimate

    plan = job.plan({})
    for line in (*summary_lines(plan.summary), *rejected_lines(plan.rejected)):
        log.info(line)
    guess = estimate(
        plan, job.loader(plan), workers=max(1, cores() if build.workers is None else build.workers)
    )
    log.info(
        f"dry run: would write {plan.version}, about {guess.bytes / 1e6:.1f} MB in {guess.seconds / 60:.1f} minutes; nothing was written"
    )
    return {
        "version": plan.version,
        "path": None,
        "found": plan.found,
        "kept": plan.kept,
        "rejected": plan.found - plan.kept,
        "splits": plan.split_sizes,
        "digest": None,
        "seconds": round(guess.seconds, 1),
        "bytes": guess.bytes,
    }


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
