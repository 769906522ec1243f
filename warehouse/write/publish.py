"""From baked chunks to a published version: metadata, tables, manifest, rename, CURRENT.

Write order: chunks -> folders -> tables -> manifest -> rename of the staging folder -> root ->
CURRENT. Each is durable before the next begins, so that a reader sees a whole version or none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from warehouse.errors import BuildError, PictureError, SpaceError
from warehouse.format import durable
from warehouse.format import manifest as tables
from warehouse.format.manifest import Manifest, read_manifest
from warehouse.layouts.plan import BuildPlan, ChunkResult, LoadSample
from warehouse.write.bake import bake_chunks, write_error
from warehouse.write.check_plan import check_plan
from warehouse.write.cluster import TaskRunner, task_runner
from warehouse.write.estimate import estimate
from warehouse.write.tasks import DONE
from warehouse.write.write_tables import drop_strays, make_manifest, metadata_rows, write_tables

__all__ = ["bake", "open_root", "published", "set_current", "staging_folder"]

LockFile = ".lock-{}"
Staging = ".staging-{}"
MakePlan = Callable[[dict[str, PictureError]], BuildPlan]
OnPlan = Callable[[BuildPlan], Callable[[int], None] | None]


def open_root(root: Path) -> None:
    """Make the output root, or raise BuildError when it cannot hold versions."""
    remedy = "choose another folder with --build.output_root"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BuildError("the output root is a file", where=root, remedy=remedy) from None
    except OSError as error:
        raise BuildError(
            "the output root cannot be made", where=root, found=error.strerror, remedy=remedy
        ) from None
    probe = root / f".staging-probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BuildError(
            "the output root is not writable", where=root, found=error.strerror, remedy=remedy
        ) from None


def _no_progress(plan: BuildPlan) -> None:
    """Show nothing."""


def bake(
    make_plan: MakePlan,
    load_for: Callable[[BuildPlan], LoadSample],
    root: Path,
    *,
    workers: int = 0,
    cluster: str | None = None,
    trace: bool | str = False,
    on_plan: OnPlan = _no_progress,
    clear: bool = False,
    preload: Callable[[], None] | None = None,
    threads: bool = False,
) -> Manifest:
    """Bake and publish a version.

    Parameters
    ----------
    make_plan
        Called with the sources that could not be made, by path: first with none, and again
        whenever more of them failed while they were baked. The new plan must leave them out.
    load_for
        Plan -> the function that makes its samples.
    root
        The output root; see `open_root`.
    workers
        Local worker processes; 0 bakes in this process.
    cluster
        Address of a running Dask scheduler whose workers see the same paths.
    trace
        Whether the version gets a trace.jsonl, or the path of a file for it outside the version.
    on_plan
        Called with each plan; returns a function that is called with the samples done, or None.
    clear
        Bake a version again that exists already, and swap it in whole. Without it, the existing one
        is returned.
    preload
        Imports what the tasks need; see `task_runner`.
    threads
        Whether tasks may run beside each other in one process; see `task_runner`.

    Returns
    -------
    Manifest
        Of the published version.

    Raises
    ------
    LockedError
        If another process builds the same version.
    SpaceError
        If the disk is too small.
    BuildError
        If the plan contradicts itself, or a chunk cannot be written. Whatever `make_plan` raises is
        raised as well.
    """
    if isinstance(trace, str):
        _make_room_for_trace(Path(trace))
    with task_runner(workers, cluster, preload, threads=threads) as run_all:
        return _bake(make_plan, load_for, root, run_all, workers, trace, on_plan, clear)


def _bake(
    make_plan: MakePlan,
    load_for: Callable[[BuildPlan], LoadSample],
    root: Path,
    run_all: TaskRunner,
    workers: int,
    trace: bool | str,
    on_plan: OnPlan,
    clear: bool,
) -> Manifest:
    plan = make_plan({})
    check_plan(plan)
    with durable.lock(root / LockFile.format(plan.version)):
        if not clear and (root / plan.version).exists():
            # Another builder was faster.
            return read_manifest(root / plan.version)
        staging = root / Staging.format(plan.version)
        unreadable: dict[str, PictureError] = {}
        run_all.run_in_background(_import_what_publishing_needs)
        while True:
            load = load_for(plan)
            _check_space(plan, load, root, staging, workers)
            results, failures = bake_chunks(
                plan, load, staging, run_all=run_all, progress=on_plan(plan)
            )
            if not failures:
                break
            failed = {str(error.where): error for error in failures}
            # A plan that keeps a failed source would be baked for ever.
            if failed.keys() <= unreadable.keys():
                raise BuildError(
                    "the plan still holds sources that cannot be made",
                    where=next(iter(failed)),
                    remedy="leave out what `make_plan` is called with",
                )
            unreadable |= failed
            plan = make_plan(unreadable)
            check_plan(plan)
        run_all.release_workers()
        try:
            return _publish(plan, results, staging, root, trace)
        except OSError as error:
            raise write_error(error, root) from None


def _make_room_for_trace(path: Path) -> None:
    """Raise BuildError before hours of work rather than after them."""
    remedy = "choose another file with --build.trace"
    if path.is_dir():
        raise BuildError("the trace is to be a file, not a folder", where=path, remedy=remedy)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            "the folder of the trace cannot be made",
            where=path.parent,
            found=error.strerror,
            remedy=remedy,
        ) from None


def _import_what_publishing_needs() -> None:
    """Import libraries while the workers bake, which saves 0.3 s."""
    import pyarrow as pa
    import zarr  # noqa: F401

    # PyArrow looks for pandas when it first sees a Python list.
    pa.array([""])


def _check_space(
    plan: BuildPlan, load: LoadSample, root: Path, staging: Path, workers: int
) -> None:
    # A resumed build has written most of its bytes already; a full disk is still a typed error.
    if staging.exists():
        return
    needed, free = estimate(plan, load, workers=workers).bytes, durable.free_bytes(root)
    if needed > free:
        raise SpaceError(
            "not enough free space for this build",
            where=root,
            expected=f"about {needed / 1e6:.0f} MB",
            found=f"{free / 1e6:.0f} MB",
            remedy="free some space or choose another --build.output_root",
        )


def _publish(
    plan: BuildPlan, results: list[ChunkResult], staging: Path, root: Path, trace: bool | str
) -> Manifest:
    wanted = {staging / row["path"] for result in results for row in result.files}
    drop_strays(staging / tables.STORE, wanted)
    version_tables = plan.layout.version_tables(plan, results, staging / tables.STORE)
    # A killed writer leaves its temporary file, which no table names.
    for torn in staging.glob(f"*{durable.TEMP_SUFFIX}"):
        torn.unlink()
    durable.fsync_tree(staging / tables.STORE)

    files = [row for result in results for row in result.files]
    files += [*version_tables.files, *metadata_rows(staging)]
    hashes = write_tables(plan, version_tables, files, staging)
    if trace:
        lines = "".join(json.dumps(result.trace) + "\n" for result in results).encode()
        path = staging / tables.TRACE if trace is True else Path(str(trace))
        durable.write_bytes(path, lines)

    # The manifest comes last: a folder that has one is complete.
    manifest = make_manifest(plan, version_tables, hashes)
    durable.remove_tree(staging / DONE)
    tables.write_manifest(staging, manifest)
    _swap_in(staging, root, plan.version)
    return manifest


def _swap_in(staging: Path, root: Path, version: str) -> None:
    """Give the finished folder its name, and let CURRENT name it."""
    target = root / version
    if not target.exists():
        durable.replace(staging, target)
        set_current(root, version)
        return

    # Exchanged in one step, so that the version is there at any moment.
    durable.exchange(staging, target)
    set_current(root, version)
    durable.remove_tree(staging)


def staging_folder(root: Path, version: str) -> Path:
    """Return the folder in which a version is made before it is published."""
    return root / Staging.format(version)


def set_current(root: Path, version: str) -> None:
    """Make CURRENT name `version`, atomically, and clear what a killed publish may have left."""
    temp, current = root / ".staging-CURRENT", root / tables.CURRENT
    with contextlib.suppress(OSError):
        if current.read_text() == version + "\n" and not temp.exists():
            return
    # Builders of different versions hold different locks, but there is one CURRENT.
    with durable.lock(root / LockFile.format("CURRENT"), wait_s=30):
        with open(temp, "wb") as file:
            file.write(f"{version}\n".encode())
            file.flush()
            os.fsync(file.fileno())
        durable.replace(temp, current)


def published(root: Path, version: str) -> Manifest | None:
    """Return the manifest of a version that exists already, or None.

    CURRENT is made to name it, and what a killed `clear` may have left of it is removed. A root
    that cannot be written is left as it is.

    Raises
    ------
    CorruptError
        If the manifest is damaged.
    LockedError
        If another process builds the version.
    """
    if not (root / version).exists():
        return None
    manifest = read_manifest(root / version)
    with contextlib.suppress(PermissionError):
        if not os.access(root, os.W_OK):
            raise PermissionError
        with durable.lock(root / LockFile.format(version)):
            durable.remove_tree(root / Staging.format(version))
            set_current(root, version)
    return manifest
