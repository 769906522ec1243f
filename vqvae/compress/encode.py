"""Encoding a cube as a published version of codes, in the layout of code_rows.py.

Codes are chosen by search.py and numbered by how often they are used; `codebook_rows` in the
manifest's summary has their rows in the codebooks. The recipe names the cube, the settings and the
checkpoint's digest, so that a version never mixes two models. Memory: one stored chunk, and a batch
in the encoder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
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
from vqvae.compress.code_rows import CodeRows, code_arrays
from vqvae.compress.codec import CubeCodec, checkpoint_digest, open_codec, restore_vqvae
from vqvae.compress.search import CodeSearch
from vqvae.settings import CompressSettings
from warehouse.errors import StateError, TrainingError
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION
from warehouse.layouts.cube.geometry import CubeSampleIndex
from warehouse.layouts.plan import Block, BuildPlan, SplitPlan
from warehouse.read.chunks import ChunkReader
from warehouse.read.version import Warehouse

__all__ = ["CodeLoader", "codes_recipe", "plan_codes"]


@dataclass(frozen=True)
class CodeLoader:
    """Loads the samples of a stored chunk for the builder, given (label, chunk of its split).

    Parameters
    ----------
    cube
        Folder of the cube's version.
    checkpoint, digest
        The decoder's checkpoint, and the digest that it must still have.
    levels
        Residual levels that are stored.
    size
        Samples of a stored chunk.
    """

    # Paths and not open objects: a loader is pickled for every worker, and a worker opens the cube
    # and the model once instead of receiving the weights with each payload.

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

        counts = np.sum([row.pop("count") for row in rows], axis=0)
        facts = {"valid": [int(number) for number in counts]}
        seconds = {"decode": time.perf_counter() - start}
        return Block(range(len(rows)), iter(rows), seconds, facts)

    def _rows(
        self, part: CubePart, reader: ChunkReader, codec: CubeCodec, indices: NDArray[np.int64]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        origins = part.sample_index.origins(indices).astype(np.int32)
        dtype = np.uint8 if codec.codebook_size <= 256 else np.uint16
        # In batches of one size, so that the memory does not depend on `shard_samples`.
        for first in range(0, len(indices), BATCH):
            batch = indices[first : first + BATCH]
            data, valid = read_blocks(part, reader, batch)
            rows = encode_blocks(codec, data, valid, self.search)
            codes = numbered(rows, self.search).astype(dtype)
            bits = np.packbits(valid.reshape(len(batch), -1), axis=1)
            counts = valid.sum(axis=(1, 2, 3))
            for row in range(len(batch)):
                yield {
                    "codes": codes[row],
                    "valid": bits[row],
                    "origin": origins[first + row],
                    "count": counts[row],
                }


# Opening a part reads the table of labels, which a large cube should do once for each worker.
@lru_cache(maxsize=len(LABEL_NAMES))
def _part(cube: Path, label: int) -> tuple[CubePart, ChunkReader]:
    part = CubePart(Warehouse.open(cube), label)
    return part, part.reader()


def codes_recipe(
    warehouse: Warehouse, settings: CompressSettings
) -> tuple[dict[str, Any], CubeCodec]:
    """Return the recipe that names a cube's version of codes, and the codec.

    Raises
    ------
    TrainingError
        The warehouse holds no cube.
    StateError
        The checkpoint was trained on other features or blocks, or has fewer levels; else as
        `restore_vqvae` for a checkpoint that is absent or damaged.
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
    """Return the plan of a cube's codes, and what loads their samples.

    It takes seconds, since the prices and numbers of the codes are learned here. It raises what
    `codes_recipe` raises.
    """
    recipe, codec = codes_recipe(warehouse, settings)
    levels = recipe["settings"]["levels"]
    search = learned_search(
        codec,
        training_vectors(codec, warehouse),
        levels=levels,
        weight=settings.rate_weight,
        paths=settings.paths,
    )

    splits = _split_plans(warehouse, codec, search, levels, settings.shard_samples)
    samples = sum(split.specs[0].shape[0] for split in splits)
    version, key = version_name(recipe)
    plan = BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        # PyTorch decides how sums are rounded, and with them which of two equally near codes is
        # chosen.
        toolchain=toolchain() | {"torch": torch.__version__},
        splits=splits,
        found=samples,
        kept=samples,
        summary=_summary(warehouse, codec, recipe, search),
        layout=CodeRows(kind="codes"),
    )
    loader = CodeLoader(
        warehouse.folder,
        settings.checkpoint,
        recipe["checkpoint"],
        settings.device,
        levels,
        settings.shard_samples,
        search,
    )
    return plan, loader


def _split_plans(
    warehouse: Warehouse, codec: CubeCodec, search: CodeSearch, levels: int, size: int
) -> tuple[SplitPlan, ...]:
    """Return the plan of each label that the cube has blocks of, `left_out` included."""
    cube = warehouse.cube
    assert cube is not None
    inner = cube.layout.inner
    blocks = zip(inner, codec.block, codec.grid, strict=True)
    grid = tuple(length // block * positions for length, block, positions in blocks)
    labels = warehouse.cube_table("split")

    splits = []
    for label, name in enumerate(LABEL_NAMES):
        samples = len(CubeSampleIndex(cube.layout, labels, label))
        if not samples:
            continue

        values = math.prod(inner) * cube.shape[3]
        specs = code_arrays(samples, size, levels, grid, codec.codebook_size, values)
        payloads = tuple((label, chunk) for chunk in range(-(-samples // size)))
        # The search is learned again when a build is resumed. On another machine rounding may
        # number the codes differently, and then no chunk of the earlier build may be kept.
        splits.append(SplitPlan.of_chunks(name, specs, payloads, search.digest))
    return tuple(splits)


def _summary(
    warehouse: Warehouse, codec: CubeCodec, recipe: Mapping[str, Any], search: CodeSearch
) -> dict[str, object]:
    cube = warehouse.cube
    assert cube is not None
    return {
        "source": warehouse.version,
        "checkpoint": recipe["checkpoint"],
        "levels": recipe["settings"]["levels"],
        "codebook_size": codec.codebook_size,
        "inner": list(cube.layout.inner),
        "features": [feature.name for feature in cube.features],
        # In the version itself: the numbers were learned from the cube, so the checkpoint cannot
        # know them.
        "codebook_rows": search.order.tolist(),
    }
