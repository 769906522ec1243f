"""python -m scripts.build_zarr --config config.yaml --build.input_root FOLDER [--build.key value]

Bakes a folder of labelled pictures into a published, checksummed Zarr version and makes CURRENT name it. Run again, it says that the
version is there; killed, it goes on where it stopped.
"""

import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from utils.argyaml import run
from utils.log import get_log, progress

log = get_log("build_zarr")


def main(settings: Any) -> dict[str, Any]:
    from ingest.plan import recipe_of
    from ingest.sources import list_sources
    from warehouse.manifest import version_name
    from warehouse.publish import open_root, published

    build, start = settings.build, time.monotonic()
    root = Path(build.output_root)
    listing = list_sources(build)
    log.info(f"{len(listing.pictures)} pictures as {listing.format} in {listing.root}")
    version, _ = version_name(recipe_of(listing, build))
    manifest = None if build.if_exists == "clear" else published(root, version)
    if manifest is not None:
        log.info(f"already built: {version}; --build.if_exists clear builds it again")
    elif build.dry_run:
        return dry_run(listing, build)
    else:
        open_root(root)
        manifest = bake_listing(listing, build, root)
    log.info(f"next: python -m scripts.inspect_zarr --inspect.path {root}, python -m scripts.train_detector --detector.warehouse {root}")
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


def planner(listing: Any, build: Any) -> Any:
    """make_plan(unreadable) for the builder: scan, check the thresholds, plan."""
    from ingest.plan import make_plan
    from ingest.validate import check_thresholds, scan

    def plan(unreadable: dict[str, Any]) -> Any:
        scanned = scan(listing, build, unreadable=unreadable)
        check_thresholds(scanned, build)
        return make_plan(listing, scanned, build)

    return plan


def bake_listing(listing: Any, build: Any, root: Path) -> Any:
    from ingest.images import warm_up
    from ingest.plan import make_loader
    from warehouse.publish import bake
    from warehouse.report import summary_lines

    workers = cores() if build.workers is None else build.workers
    with ExitStack() as stack:

        def on_plan(plan: Any) -> Any:
            for line in summary_lines(plan.summary):
                log.info(line)
            return stack.enter_context(progress(plan.samples, "pictures", f"baking {plan.version}")).advance

        return bake(
            planner(listing, build),
            partial(make_loader, listing, build),
            root,
            workers=workers,
            cluster=build.cluster,
            trace=build.trace,
            on_plan=on_plan,
            clear=build.if_exists == "clear",
            warm_up=warm_up,
        )


def cores() -> int:
    """Cores this process may use; the affinity mask is Linux's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dry_run(listing: Any, build: Any) -> dict[str, Any]:
    from ingest.plan import make_loader
    from warehouse.builder import estimate
    from warehouse.report import rejected_lines, summary_lines

    plan = planner(listing, build)({})
    for line in (*summary_lines(plan.summary), *rejected_lines(plan.rejected)):
        log.info(line)
    guess = estimate(plan, make_loader(listing, build, plan), workers=max(1, cores() if build.workers is None else build.workers))
    log.info(
        f"dry run: would write {plan.version}, about {guess.bytes / 1e6:.1f} MB in {guess.seconds / 60:.1f} minutes; nothing was written"
    )
    splits = {split.name: len(split.payloads) for split in plan.splits}
    return {
        "version": plan.version,
        "path": None,
        "found": plan.found,
        "kept": plan.kept,
        "rejected": plan.found - plan.kept,
        "splits": splits,
        "digest": None,
        "seconds": round(guess.seconds, 1),
        "bytes": guess.bytes,
    }


if __name__ == "__main__":
    raise SystemExit(run(main, __doc__, build="warehouse.schema:BuildSettings"))
