"""Baking a version with a progress bar, unless it is published already.

Purpose: `bake_with_progress` and `bake_once`, which all commands share that make a version.
Used by: scripts.build_zarr, segmentation.cutting, vqvae.compress.publish_codes
Design notes: a plan may change once pictures turn out to be unreadable, so a bar is opened for each
  plan, and all of them are closed at the end.
Assistant guidance: when extending: this module knows nothing of what is baked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from utils.log import get_log, progress
from warehouse.errors import PictureError
from warehouse.format.manifest import Manifest, version_name
from warehouse.layouts.plan import BuildPlan, LoadSample
from warehouse.write.publish import bake, open_root, published

__all__ = ["bake_once", "bake_with_progress"]

log = get_log(__name__)
MakePlan = Callable[[dict[str, PictureError]], BuildPlan]


def bake_with_progress(
    make_plan: MakePlan,
    load_for: Callable[[BuildPlan], LoadSample],
    root: Path,
    *,
    noun: str,
    verb: str = "baking",
    describe: Callable[[BuildPlan], Iterable[str]] | None = None,
    workers: int = 0,
    cluster: str | None = None,
    trace: bool | str = True,
    clear: bool = False,
    preload: Callable[[], None] | None = None,
    threads: bool = False,
) -> Manifest:
    """Bake and publish a version below `root`, with a progress bar for each plan.

    Parameters
    ----------
    noun, verb
        For the bar: what is counted and what is done.
    describe
        Lines for the log about a plan; None: nothing is logged.

    Notes
    -----
    All other parameters are those of `warehouse.write.publish.bake`.
    """
    with ExitStack() as stack:

        def on_plan(plan: BuildPlan) -> Callable[[int], None]:
            for line in describe(plan) if describe else ():
                log.info("%s", line)
            bar = progress(plan.samples, noun, f"{verb} {plan.version}")
            return stack.enter_context(bar).advance

        return bake(
            make_plan,
            load_for,
            root,
            workers=workers,
            cluster=cluster,
            trace=trace,
            on_plan=on_plan,
            clear=clear,
            preload=preload,
            threads=threads,
        )


def bake_once(
    recipe: Mapping[str, Any],
    make_plan: MakePlan,
    load_for: Callable[[BuildPlan], LoadSample],
    root: Path,
    *,
    noun: str,
    verb: str = "baking",
    workers: int = 0,
    clear: bool = False,
) -> Manifest:
    """The published version of a recipe below `root`, baked now if it is not there.

    Parameters
    ----------
    recipe
        Names the version, so that nothing is planned where the version exists.
    clear
        Bake the version again even if it exists.
    """
    version, _ = version_name(dict(recipe))
    manifest = None if clear else published(root, version)
    if manifest is not None:
        log.info("%s exists already", version)
        return manifest
    open_root(root)
    return bake_with_progress(
        make_plan, load_for, root, noun=noun, verb=verb, workers=workers, clear=clear
    )
