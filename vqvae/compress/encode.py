"""A cube as a published version of codes: one sample an inner chunk of the cube, in the cube's
splits.

    <split>/codes   u1|u2 [sample, level, latent_t, latent_y, latent_x]   indices into the codebooks, the smallest type that holds them
            valid   u1    [sample, byte]                                  bits of `valid` [time, y, x, feature], C order, first bit highest
            origin  i4    [sample, axis]                                  first voxel (t, y, x) in the cube

What lies in no split of the cube is a split `left_out` here, so that all of it comes back. A stored
chunk is one Blosc-zstd buffer of `shard_samples` samples and decodes alone: an inner chunk a sample
would cost 36 bytes of header, checksum and index for 200-600 of codes. Codes are chosen by
search.py and numbered by use; `codebook_rows` of the manifest's summary has their rows. Memory: one
stored chunk, and a batch in the encoder. The manifest names cube, checkpoint digest and settings in
its recipe.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from vqvae.compress.blocks import (
    BATCH,
    LABEL_NAMES,
    CubePart,
    encode_blocks,
    learned_search,
    numbered,
    read_blocks,
    training_vectors,
)
from vqvae.compress.codec import CubeCodec, restore_vqvae
from vqvae.compress.search import CodeSearch
from vqvae.settings import CompressSettings
from warehouse.errors import StateError, TrainingError
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, ArraySpec, Codec
from warehouse.layouts.cube.geometry import CubeSampleIndex
from warehouse.layouts.plan import Block, BuildPlan, ChunkResult, SplitPlan
from warehouse.layouts.rows import Rows
from warehouse.read.chunks import ChunkReader
from warehouse.read.version import Warehouse

__all__ = [
    "CODES_SAMPLES_SCHEMA",
    "CodeLoader",
    "CodeRows",
    "checkpoint_digest",
    "code_arrays",
    "codes_recipe",
    "open_codec",
    "plan_codes",
]

CODES_SAMPLES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("t", pa.int64()),
        ("y", pa.int64()),
        ("x", pa.int64()),
        ("sha256", pa.string()),
    ]
)
"""t, y, x: first voxel in the cube; sha256: of codes, valid and origin, decoded."""


def checkpoint_digest(codec: CubeCodec) -> str:
    """sha256 of the checkpoint's safetensors file."""
    return str(json.loads(codec.path.read_bytes())["sha256"])


@lru_cache(maxsize=2)
def open_codec(path: str, digest: str | None, device: str = "cpu") -> CubeCodec:
    """The codec of a checkpoint, once a process.

    Raises StateError when it is not the one of that digest; else as `restore_vqvae`.
    """
    codec = restore_vqvae(path, device=device)
    found = checkpoint_digest(codec)
    if digest is not None and found != digest:
        raise StateError(
            "these codes were made with another checkpoint",
            where=codec.path,
            expected=f"sha256 {digest[:12]}",
            found=found[:12],
            remedy="name the one they were made with: --compress.checkpoint FOLDER",
        )
    return codec


def code_arrays(
    samples: int, size: int, levels: int, grid: Sequence[int], codebook_size: int, valid_bits: int
) -> tuple[ArraySpec, ...]:
    """Arrays of one split. size: samples of a stored chunk; grid.

    Latent positions (t, y, x) of a sample.
    """
    dtype = "uint8" if codebook_size <= 256 else "uint16"
    row, width = (levels, *grid), -(-valid_bits // 8)
    dims = ("sample", "level", "latent_t", "latent_y", "latent_x")
    # Zstd's Huffman stage works on bytes: bytes of equal weight side by side beat planes of bits
    # (docs/compression.md).
    codes = Codec("zstd", 9, dtype != "uint8", np.dtype(dtype).itemsize)
    rows: list[tuple[str, tuple[int, ...], str, tuple[str, ...], Codec, str]] = [
        ("codes", row, dtype, dims, codes, "indices into the codebooks, first level first"),
        (
            "valid",
            (width,),
            "uint8",
            ("sample", "byte"),
            Codec("zstd", 9),
            "bits of valid [time, y, x, feature], first bit highest",
        ),
        (
            "origin",
            (3,),
            "int32",
            ("sample", "axis"),
            Codec("zstd", 9, True, 4),
            "first voxel (time, y, x) in the cube",
        ),
    ]
    return tuple(
        ArraySpec(
            name, (samples, *shape), kind, axes, (size, *shape), None, codec, {"long_name": text}
        )
        for name, shape, kind, axes, codec, text in rows
    )


@dataclass(frozen=True)
class CodeLoader:
    """`load` of the builder: (label, stored chunk of its split) -> its samples.

    Travels to workers; opens cube and model there.
    """

    cube: Path
    checkpoint: str
    digest: str
    device: str
    levels: int
    size: int
    search: CodeSearch

    def __call__(self, payload: tuple[int, int]) -> Block:
        label, chunk = payload
        part, reader = _part(self.cube, label)
        start = time.perf_counter()
        indices = np.arange(chunk * self.size, min((chunk + 1) * self.size, len(part)))
        codec = open_codec(self.checkpoint, self.digest, self.device)
        rows = list(self._rows(part, reader, codec, indices))
        facts = {
            "valid": [int(number) for number in np.sum([row.pop("count") for row in rows], axis=0)]
        }
        return Block(range(len(rows)), iter(rows), {"decode": time.perf_counter() - start}, facts)

    def _rows(
        self, part: CubePart, reader: ChunkReader, codec: CubeCodec, indices: NDArray[np.int64]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        origins = part.sample_index.origins(indices).astype(np.int32)
        dtype = np.uint8 if codec.codebook_size <= 256 else np.uint16
        for first in range(0, len(indices), BATCH):
            some = indices[first : first + BATCH]
            data, valid = read_blocks(part, reader, some)
            rows = encode_blocks(codec, data, valid, self.search)
            codes = numbered(rows, self.search).astype(dtype)
            bits = np.packbits(valid.reshape(len(some), -1), axis=1)
            counts = valid.sum(axis=(1, 2, 3))
            for at in range(len(some)):
                yield {
                    "codes": codes[at],
                    "valid": bits[at],
                    "origin": origins[first + at],
                    "count": counts[at],
                }


@lru_cache(maxsize=len(LABEL_NAMES))
def _part(cube: Path, label: int) -> tuple[CubePart, ChunkReader]:
    part = CubePart(Warehouse.open(cube), label)
    return part, part.reader()


def codes_recipe(
    warehouse: Warehouse, settings: CompressSettings
) -> tuple[dict[str, Any], CubeCodec]:
    """What names a cube's version of codes, and its codec.

    Raises TrainingError for a warehouse of pictures; StateError for a checkpoint of other features,
    block or fewer levels; as `restore_vqvae` for one that is absent or damaged.
    """
    cube = warehouse.cube
    if cube is None:
        raise TrainingError(
            "this warehouse holds no cube",
            where=warehouse.location,
            remedy="build one with python -m scripts.build_zarr --build.format raster",
        )
    codec = restore_vqvae(settings.checkpoint, cube.features, settings.device)
    inner = cube.layout.inner
    if any(size % part for size, part in zip(inner, codec.block, strict=True)):
        raise StateError(
            "the checkpoint was trained on other blocks",
            where=codec.path,
            expected=f"divisors of {list(inner)}",
            found=list(codec.block),
            remedy="train on this cube with python -m scripts.train_vqvae",
        )
    levels = codec.levels if settings.levels is None else settings.levels
    if levels > codec.levels:
        raise StateError(
            "the checkpoint has fewer levels",
            where=codec.path,
            expected=f"at least {levels}",
            found=codec.levels,
            remedy="lower --compress.levels",
        )
    source = {
        "version": warehouse.version,
        "digest": warehouse.manifest.digest,
        "cube": cube.to_json(),
        "summary": warehouse.manifest.summary,
    }
    chosen = settings.content() | {"levels": levels}
    recipe = {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "format": "codes",
        "source": source,
        "checkpoint": checkpoint_digest(codec),
        "settings": chosen,
    }
    return recipe, codec


def plan_codes(warehouse: Warehouse, settings: CompressSettings) -> tuple[BuildPlan, CodeLoader]:
    """The build of a cube's codes and its `load`; raises what `codes_recipe` does.

    Takes seconds: prices and numbers are learned here.
    """
    recipe, codec = codes_recipe(warehouse, settings)
    cube = warehouse.cube
    assert cube is not None
    inner, digest, levels = cube.layout.inner, recipe["checkpoint"], recipe["settings"]["levels"]
    grid = tuple(
        size // part * cells
        for size, part, cells in zip(inner, codec.block, codec.grid, strict=True)
    )
    version, key = version_name(recipe)
    search = learned_search(
        codec,
        training_vectors(codec, warehouse),
        levels=levels,
        weight=settings.rate_weight,
        paths=settings.paths,
    )
    labels = warehouse.cube_table("split")
    splits, total = [], 0
    for label, name in enumerate(LABEL_NAMES):
        samples = len(CubeSampleIndex(cube.layout, labels, label))
        if not samples:
            continue
        total += samples
        specs = code_arrays(
            samples,
            settings.shard_samples,
            levels,
            grid,
            codec.codebook_size,
            math.prod(inner) * cube.shape[3],
        )
        chunks = -(-samples // settings.shard_samples)
        payloads = tuple((label, chunk) for chunk in range(chunks))
        # Learned anew by whoever goes on: on another machine a rounding may number codes otherwise,
        # and then no chunk may be kept.
        splits.append(SplitPlan.of_chunks(name, specs, payloads, search.digest))
    summary = {
        "source": warehouse.version,
        "checkpoint": digest,
        "levels": levels,
        "codebook_size": codec.codebook_size,
        "inner": list(inner),
        "features": [feature.name for feature in cube.features],
        "codebook_rows": search.order.tolist(),
    }
    tools = toolchain() | {"torch": torch.__version__}
    plan = BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        toolchain=tools,
        splits=tuple(splits),
        found=total,
        kept=total,
        summary=summary,
        layout=CodeRows(kind="codes"),
    )
    loader = CodeLoader(
        warehouse.folder,
        settings.checkpoint,
        digest,
        settings.device,
        levels,
        settings.shard_samples,
        search,
    )
    return plan, loader


class CodeRows(Rows):
    """The layout of codes: each sample's first voxel in the cube, read back from the codes."""

    schema: ClassVar[pa.Schema] = CODES_SAMPLES_SCHEMA

    def root_attributes(self, plan: BuildPlan) -> dict[str, Any]:
        return {"layout": self.kind, "version": plan.version}

    def group_attributes(
        self, plan: BuildPlan, split: SplitPlan, summary: Mapping[str, Any]
    ) -> dict[str, Any]:
        # In the manifest alone: as attributes of every group they would weigh more than some codes.
        shown = {key: value for key, value in summary.items() if key != "codebook_rows"}
        return {
            "class_names": [],
            "layout": self.kind,
            "split": split.name,
            "summary": shown,
        }

    def summary(self, plan: BuildPlan, results: Sequence[ChunkResult]) -> dict[str, Any]:
        valid = np.sum([result.facts["valid"] for result in results], axis=0)
        return plan.summary | {"valid": [int(count) for count in valid]}

    def sample_columns(
        self, plan: BuildPlan, digests: Mapping[str, Sequence[str]], store: Path
    ) -> dict[str, Any]:
        parts: list[dict[str, NDArray[Any]]] = []
        for split in plan.splits:
            found = digests[split.name]
            origins = _origins(store, split, len(found))
            parts.append(
                {
                    "split": np.full(len(found), split.name),
                    "index": np.arange(len(found)),
                    "t": origins[:, 0],
                    "y": origins[:, 1],
                    "x": origins[:, 2],
                    "sha256": np.array(found),
                }
            )

        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def digested(self, plan: BuildPlan, digests: Mapping[str, Sequence[str]]) -> list[Any]:
        return [
            plan.recipe["checkpoint"],
            plan.recipe["source"]["digest"],
            list(digests),
            [list(part) for part in digests.values()],
        ]


def _origins(store: Path, split: SplitPlan, samples: int) -> NDArray[np.int64]:
    """int64 [samples, 3], from the chunks just written."""
    from warehouse.format.inner_chunks import chunk_key, decode_into

    spec = next(spec for spec in split.specs if spec.name == "origin")
    out = np.empty((len(split.payloads), *spec.chunk), spec.dtype)
    for chunk in range(len(out)):
        decode_into(
            memoryview((store / split.name / spec.name / chunk_key(spec, chunk)).read_bytes()),
            out[chunk],
            spec.codec,
            True,
        )
    return out.reshape(-1, 3)[:samples].astype(np.int64)
