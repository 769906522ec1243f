"""python -m benchmarks.scale FOLDER INTERLEAVE

One measurement, in a fresh process that `measure_scale` starts.

A version of 10^9 samples in 10^6 stored chunks for 1,024 ranks, real but for its data files:
manifest and table of files are whole, only the chunk that the first batch of the measured rank lies
in exists. So opening, the table's digest, the sampler and the loader are what they would be;
pictures are small, since their size is not what is being asked. The interpreter and the imports are
not timed, but are in the memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import ROOT
from warehouse import Warehouse
from warehouse.format import manifest as tables
from warehouse.format import parquet_tables
from warehouse.format.inner_chunks import encode
from warehouse.format.schema import FORMAT_VERSION, Codec
from warehouse.format.shards import ShardWriter

__all__ = ["measure_scale", "write_version"]

CHUNKS, PER_CHUNK, WORLD_SIZE, RANK, BATCH = 1_000_000, 1_000, 1_024, 777, 64
ROW = (3, 8, 8)
INTERLEAVES = (1, WORLD_SIZE)
RECIPE = {"of": "benchmarks.scale"}
VERSION, KEY = tables.version_name(RECIPE)


def write_version(folder: Path, chunks: int, per_chunk: int, present: list[int]) -> None:
    """A version of chunks * per_chunk samples.

    Only the stored chunks `present` (all with the same content) have a file.
    """
    base = folder / VERSION / tables.STORE / "train" / "image"
    pixels = np.random.default_rng(0).integers(0, 256, (per_chunk, *ROW)).astype(np.uint8)
    codec = Codec()
    size = seal = 0
    for chunk in present:
        path = base / "c" / str(chunk) / "0" / "0" / "0"
        path.parent.mkdir(parents=True)
        with open(path, "wb") as file:
            writer = ShardWriter(file, per_chunk)
            for row in pixels:
                writer.append(encode(row, codec))
            seal = writer.finish()
        size = path.stat().st_size
    numbers = range(chunks)
    columns = {
        "path": [f"{tables.STORE}/train/image/c/{chunk}/0/0/0" for chunk in numbers],
        "size": np.full(chunks, size),
        "sha256": [hashlib.sha256(chunk.to_bytes(8, "little")).hexdigest() for chunk in numbers],
        "array": ["train/image"] * chunks,
        "chunk": np.arange(chunks),
        "seal": np.full(chunks, seal, np.uint32),
    }
    files = parquet_tables.write_table(
        folder / VERSION / tables.FILES, columns, parquet_tables.FILES_SCHEMA
    )
    spec = {
        "dtype": "uint8",
        "row": list(ROW),
        "dims": ["sample", "channel", "y", "x"],
        "sharded": True,
        "attrs": {},
    }
    spec["codec"] = {key: getattr(codec, key) for key in codec.__slots__}
    samples = chunks * per_chunk
    manifest = tables.Manifest(
        format_version=FORMAT_VERSION,
        version=VERSION,
        key=KEY,
        recipe=RECIPE,
        thresholds={},
        toolchain={},
        digest="",
        found=samples,
        kept=samples,
        rejected=0,
        class_names=[],
        splits={"train": {"samples": samples, "shard_samples": per_chunk, "chunks": chunks}},
        arrays={"image": spec},
        summary={},
        warnings=[],
        tables={tables.FILES: files},
    )
    tables.write_manifest(folder / VERSION, manifest)
    (folder / "CURRENT").write_text(VERSION + "\n")


def measure_scale(
    folder: Path, log: Any, *, chunks: int = CHUNKS, per_chunk: int = PER_CHUNK
) -> dict[str, Any]:
    """{"runs".

    A dict an interleave} of seconds to the first batch and peak memory, each in a fresh process.
    The version is removed.
    """
    from utils.samplers import ChunkBatchSampler

    shutil.rmtree(folder, ignore_errors=True)
    sizes = [per_chunk] * chunks
    first: set[int] = set()
    for interleave in INTERLEAVES:
        sampler = ChunkBatchSampler(
            sizes, BATCH, interleave=interleave, rank=RANK, world_size=WORLD_SIZE
        )
        plans = sampler.batches(0)
        for _ in range(4):
            first |= set((next(plans).indices // per_chunk).tolist())
    log.info(f"writing the tables of {chunks * per_chunk:,} samples in {chunks:,} stored chunks")
    write_version(folder, chunks, per_chunk, sorted(first))
    runs = []
    for interleave in INTERLEAVES:
        command = [sys.executable, "-m", "benchmarks.scale", str(folder), str(interleave)]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            )
        }
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode:
            runs.append(
                {"interleave": interleave, "absent": done.stderr.strip().split("\n")[-1][:300]}
            )
            continue
        runs.append(json.loads(done.stdout.strip().split("\n")[-1]))
        log.info(f"scale: {runs[-1]}")
    shutil.rmtree(folder)
    return {
        "samples": chunks * per_chunk,
        "chunks": chunks,
        "world_size": WORLD_SIZE,
        "rank": RANK,
        "batch_size": BATCH,
        "runs": runs,
    }


def first_batch(folder: Path, interleave: int) -> dict[str, Any]:
    """Open, make a loader for one of the ranks, take a batch.

    Seconds of each step, MB at the peak.
    """
    from utils.loader import ChunkLoader

    before = memory_mb("VmRSS")
    start = time.perf_counter()
    split = Warehouse.open(folder).split("train")
    opened = time.perf_counter()
    loader = ChunkLoader(
        split,
        BATCH,
        engine="inline",
        store="mmap",
        interleave=interleave,
        rank=RANK,
        world_size=WORLD_SIZE,
    )
    made = time.perf_counter()
    batch = next(iter(loader))
    end = time.perf_counter()
    assert len(batch["index"]) == BATCH
    loader.close()
    return {
        "interleave": interleave,
        "seconds": end - start,
        "open_s": opened - start,
        "loader_s": made - opened,
        "batch_s": end - made,
        "peak_mb": memory_mb("VmHWM"),
        "imports_mb": before,
        "anonymous_mb": memory_mb("RssAnon"),
    }


def memory_mb(key: str) -> float | None:
    """VmRSS, VmHWM (its peak) or RssAnon (without mapped library files) of this process.

    None off Linux.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return round(
        next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024, 1
    )


if __name__ == "__main__":
    print(json.dumps(first_batch(Path(sys.argv[1]), int(sys.argv[2]))))
