"""Publishing a cube's codes, and the cube that they decode to, as versions.

Both are named by their recipes before anything is encoded, so that a version that exists already is
found at once, and an interrupted one is resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from utils.jobs.bake_version import bake_once
from vqvae.compress.encode import codes_recipe, plan_codes
from vqvae.compress.reconstruct import plan_reconstruction
from vqvae.settings import CompressSettings
from warehouse.format.manifest import Manifest
from warehouse.layouts.plan import BuildPlan, LoadSample
from warehouse.read.version import Warehouse

__all__ = ["publish_codes", "publish_reconstruction"]


def publish_codes(cube: Warehouse, settings: CompressSettings) -> Manifest:
    """Return the version of codes of a cube below `output_root`, encoding it if it is not there."""
    recipe, _ = codes_recipe(cube, settings)
    root = Path(settings.output_root)
    return _publish(recipe, lambda: plan_codes(cube, settings), root, settings)


def publish_reconstruction(codes: Path, root: Path, settings: CompressSettings) -> Manifest:
    """Return the cube that a version of codes decodes to, below `root`.

    It is decoded now if it is not there.
    """
    plan, load = plan_reconstruction(codes, settings.checkpoint, device=settings.device)
    return _publish(plan.recipe, lambda: (plan, load), root, settings)


def _publish(
    recipe: Mapping[str, object],
    prepare: Callable[[], tuple[BuildPlan, LoadSample]],
    root: Path,
    settings: CompressSettings,
) -> Manifest:
    # Planning codes takes seconds, since it learns their prices: it happens once and only if
    # needed.
    prepared = cache(prepare)
    return bake_once(
        recipe,
        lambda _: prepared()[0],
        lambda _: prepared()[1],
        root,
        noun="stored chunks",
        workers=settings.workers,
        clear=settings.if_exists == "clear",
    )
