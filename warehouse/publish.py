"""From baked chunks to a published version: metadata, tables, manifest, rename, CURRENT.

Write order (DESIGN section 4): chunks -> folders -> tables -> manifest -> rename of the staging folder -> root -> CURRENT. Each is
durable before the next begins, so that a reader sees a whole version or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from warehouse import durable
from warehouse import manifest as tables
from warehouse.builder import DONE, BuildPlan, ChunkResult, LoadSample, bake_chunks, estimate, write_error
from warehouse.errors import BuildError, PictureError, SpaceError
from warehouse.manifest import Manifest, read_manifest
from warehouse.schema import ArraySpec
from warehouse.summary import SAMPLES_SCHEMA

__all__ = ["bake", "open_root", "published", "set_current"]

LockFile = ".lock-{}"
Staging = ".staging-{}"
MakePlan = Callable[[dict[str, PictureError]], BuildPlan]


def open_root(root: Path) -> None:
    """Make the output root, or raise BuildError when it cannot hold versions."""
    remedy = "choose another folder with --build.output_root"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise BuildError("the output root is a file", where=root, remedy=remedy) from None
    except OSError as error:
        raise BuildError("the output root cannot be made", where=root, found=error.strerror, remedy=remedy) from None
    probe = root / f".staging-probe-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BuildError("the output root is not writable", where=root, found=error.strerror, remedy=remedy) from None


def bake(
    make_plan: MakePlan,
    load_for: Callable[[BuildPlan], LoadSample],
    root: Path,
    *,
    workers: int,
    cluster: str | None,
    trace: bool,
    on_plan: Callable[[BuildPlan], Callable[[int], None] | None],
    clear: bool = False,
) -> Manifest:
    """Bake and publish; the manifest. `make_plan(unreadable)` is called again once pictures turn out unreadable while being baked.

    clear: bake a version again that is there already, and swap it in whole; without it the one that is there is the answer.

    Raises LockedError, SpaceError, BuildError, and whatever `make_plan` raises.
    """
    plan = make_plan({})
    with durable.lock(root / LockFile.format(plan.version)):
        if not clear and (root / plan.version).exists():
            return read_manifest(root / plan.version)  # another builder was faster
        staging = root / Staging.format(plan.version)
        unreadable: dict[str, PictureError] = {}
        while True:
            load = load_for(plan)
            _check_space(plan, load, root, staging, workers)
            results, failures = bake_chunks(plan, load, staging, workers=workers, cluster=cluster, progress=on_plan(plan))
            if not failures:
                break
            unreadable |= {str(error.where): error for error in failures}
            plan = make_plan(unreadable)
        try:
            return _publish(plan, results, staging, root, trace)
        except OSError as error:
            raise write_error(error, root) from None


def _check_space(plan: BuildPlan, load: LoadSample, root: Path, staging: Path, workers: int) -> None:
    if staging.exists():
        return  # resumed: most of it is written already, and a full disk is still a typed error
    needed, free = estimate(plan, load, workers=workers).bytes, durable.free_bytes(root)
    if needed > free:
        raise SpaceError(
            "not enough free space for this build",
            where=root,
            expected=f"about {needed / 1e6:.0f} MB",
            found=f"{free / 1e6:.0f} MB",
            remedy="free some space or choose another --build.output_root",
        )


def _publish(plan: BuildPlan, results: list[ChunkResult], staging: Path, root: Path, trace: bool) -> Manifest:
    wanted = {staging / row["path"] for result in results for row in result.files}
    _drop_strays(staging / tables.STORE, wanted)
    _write_metadata(plan, staging / tables.STORE)
    files = [row for result in results for row in result.files]
    for torn in staging.glob(f"*{durable.TEMP_SUFFIX}"):
        torn.unlink()
    for path in sorted((staging / tables.STORE).rglob("zarr.json")):
        name = path.relative_to(staging).as_posix()
        files.append(
            {"path": name, "size": path.stat().st_size, "sha256": tables.sha256_file(path), "array": None, "chunk": None, "seal": None}
        )
    durable.fsync_tree(staging / tables.STORE)
    files.sort(key=lambda row: row["path"])
    digests = [digest for result in results for digest in result.samples]
    hashes = {
        tables.FILES: tables.write_table(staging / tables.FILES, _columns(files), tables.FILES_SCHEMA),
        tables.SAMPLES: tables.write_table(staging / tables.SAMPLES, _columns(_sample_rows(plan, digests)), SAMPLES_SCHEMA),
    }
    lines = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in plan.rejected).encode()
    durable.write_bytes(staging / tables.REJECTED, lines)
    hashes[tables.REJECTED] = hashlib.sha256(lines).hexdigest()
    if trace:
        durable.write_bytes(staging / tables.TRACE, "".join(json.dumps(result.trace) + "\n" for result in results).encode())
    manifest = _manifest(plan, digests, hashes)
    durable.remove_tree(staging / DONE)
    durable.remove_tree(staging / "dask")
    tables.write_manifest(staging, manifest)
    target = root / plan.version
    if target.exists():
        durable.exchange(staging, target)
        set_current(root, plan.version)
        durable.remove_tree(staging)
    else:
        durable.replace(staging, target)
        set_current(root, plan.version)
    return manifest


def set_current(root: Path, version: str) -> None:
    """Make CURRENT name `version`, atomically; clears what a killed publish may have left."""
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


def _drop_strays(store: Path, wanted: set[Path]) -> None:
    """Files of an earlier plan (fewer samples now) do not belong to the version."""
    for path in sorted(store.rglob("*"), reverse=True):
        if path.is_file() and path not in wanted:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _write_metadata(plan: BuildPlan, store: Path) -> None:
    """Groups, arrays and consolidated metadata through zarr-python; chunk files are there already."""
    import zarr

    with warnings.catch_warnings():
        # Zarr v3 has consolidated metadata in practice but not yet in the specification, and says so each time.
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        root = zarr.open_group(store, mode="a", zarr_format=3)
        shared = {"class_names": list(plan.class_names), "layout": "pictures", "version": plan.version}
        root.attrs.update(shared | {"summary": plan.summary})
        for split in plan.splits:
            group = root.create_group(split.name)
            group.attrs.update(shared | {"split": split.name, "summary": plan.group_summaries[split.name]})
            for spec in split.specs:
                _create_array(group, spec)
            zarr.consolidate_metadata(store, path=split.name, zarr_format=3)
        zarr.consolidate_metadata(store, zarr_format=3)


def _create_array(group: Any, spec: ArraySpec) -> None:
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

    from warehouse.shards import fill_value

    codec = spec.codec
    compressors: list[Any] = [Crc32cCodec()]
    if codec.cname is not None:
        shuffle = "shuffle" if codec.shuffle else "noshuffle"
        blosc = BloscCodec(typesize=codec.typesize, cname=codec.cname, clevel=codec.clevel, shuffle=shuffle, blocksize=codec.blocksize)  # type: ignore[arg-type]
        compressors.insert(0, blosc)
    group.create_array(
        spec.name,
        shape=spec.shape,
        dtype=spec.dtype,
        chunks=spec.inner or spec.chunk,
        shards=spec.chunk if spec.inner else None,
        serializer=BytesCodec(endian=None if spec.dtype in {"uint8", "bool"} else "little"),
        compressors=compressors,
        filters=None,
        fill_value=fill_value(spec),
        dimension_names=spec.dims,
        attributes=dict(spec.attrs),
        config={"write_empty_chunks": True},
    )


def _sample_rows(plan: BuildPlan, digests: list[str]) -> list[dict[str, Any]]:
    rows = [{"split": split.name, "index": at, **row} for split in plan.splits for at, row in enumerate(split.rows)]
    return [row | {"sha256": digest} for row, digest in zip(rows, digests, strict=True)]


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def _manifest(plan: BuildPlan, digests: list[str], hashes: dict[str, str]) -> Manifest:
    arrays = {
        spec.name: {
            "dtype": spec.dtype,
            "row": list(spec.shape[1:]),
            "dims": list(spec.dims),
            "sharded": spec.inner is not None,
            "codec": {key: getattr(spec.codec, key) for key in spec.codec.__slots__},
            "attrs": spec.attrs,
        }
        for spec in plan.splits[0].specs
    }
    content = [
        [{name: [raw["dtype"], raw["row"]] for name, raw in arrays.items()}, list(plan.class_names)],
        [[split.name, len(split.payloads)] for split in plan.splits],
        digests,
    ]
    splits = {
        split.name: {
            "samples": len(split.payloads),
            "shard_samples": split.shard_samples,
            "chunks": -(-len(split.payloads) // split.shard_samples),
        }
        for split in plan.splits
    }
    return Manifest(
        format_version=plan.recipe["format_version"],
        version=plan.version,
        key=plan.key,
        recipe=plan.recipe,
        thresholds=plan.thresholds,
        toolchain=plan.toolchain,
        digest=hashlib.sha256(tables.canonical(content)).hexdigest(),
        found=plan.found,
        kept=plan.kept,
        rejected=plan.found - plan.kept,
        class_names=list(plan.class_names),
        splits=splits,
        arrays=arrays,
        summary=plan.summary,
        warnings=list(plan.warnings),
        tables=hashes,
    )


def published(root: Path, version: str) -> Manifest | None:
    """The manifest of a version that is there already, with CURRENT naming it; None when it is not. Raises CorruptError, LockedError.

    What a killed `clear` may have left of the version is removed. A root that cannot be written is left as it is.
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
