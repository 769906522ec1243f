"""A version of patches as a published version of class probabilities, in the same resumable jobs as
features.

    <split>/probability   f2 [sample, class, y, x]   a stored chunk is a job of as many patches as the patches' own

Planned here, done by `utils.jobs`: a killed job is done again and no other, several processes may
share the queue. Batches never cross a job. Memory: the model, one batch, a job's probabilities.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segmentation.unet import UNet
from utils.training.checkpoint import Checkpoint
from warehouse.errors import StateError
from warehouse.format import manifest as tables
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, ArraySpec, Codec
from warehouse.layouts.pictures import SAMPLES_SCHEMA
from warehouse.layouts.plan import Block, BuildPlan, SplitPlan
from warehouse.layouts.rows import Rows
from warehouse.read.chunks import ChunkReader
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse

__all__ = ["ProbabilityLoader", "patches_of", "place_of", "plan_probabilities"]


def plan_probabilities(
    patches: Warehouse,
    model: UNet,
    checkpoint: Checkpoint,
    batch_size: int,
    device: torch.device | None = None,
) -> tuple[BuildPlan, ProbabilityLoader]:
    """The build of every patch's probabilities, and its `load`. Raises StateError for a model of
    other patches or classes.

    device: None is the CPU. Its type is part of the recipe: another one rounds otherwise.
    """
    device = device or torch.device("cpu")
    channels, height, width = patches.manifest.arrays["image"].row
    classes = len(patches.manifest.class_names)
    for what, of_patches, of_model in (
        ("channels", channels, model.channels),
        ("classes", classes, model.classes),
    ):
        if of_patches != of_model:
            raise StateError(
                f"the checkpoint is of a model of other {what}",
                where=checkpoint.path,
                expected=of_patches,
                found=of_model,
                remedy=f"name another --segment.checkpoint, or give the {what} it was trained with",
            )
    if height % model.multiple or width % model.multiple:
        raise StateError(
            "the checkpoint's model does not take patches of this size",
            where=checkpoint.path,
            expected=f"a multiple of {model.multiple}",
            found=f"{height} x {width}",
            remedy="change --segment.patch_size, or name another --segment.checkpoint",
        )
    recipe = {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "format": "probabilities",
        "source": {"version": patches.version, "digest": patches.manifest.digest},
        "model": {**model.describe(), "weights": weights_digest(checkpoint)},
        "settings": {"batch_size": batch_size, "device": device.type},
    }
    version, key = version_name(recipe)
    splits = []
    for name in patches.splits:
        split = patches.split(name)
        chunks, size, row = len(split.chunk_sizes), split.shard_samples, (classes, height, width)
        spec = ArraySpec(
            "probability",
            (len(split), *row),
            "float16",
            ("sample", "class", "y", "x"),
            (size, *row),
            (1, *row),
            Codec("lz4", 1, True, 2),
            {"long_name": "probability of each class"},
        )
        splits.append(SplitPlan.of_chunks(name, [spec], [(name, at) for at in range(chunks)]))
    manifest = patches.manifest
    total = sum(len(patches.split(name)) for name in patches.splits)
    rows = patches.table(tables.SAMPLES, list(SAMPLES_SCHEMA.names)).to_pylist()
    plan = BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        toolchain=toolchain() | {"torch": torch.__version__},
        splits=tuple(splits),
        class_names=tuple(manifest.class_names),
        found=total,
        kept=total,
        summary=manifest.summary,
        warnings=tuple(manifest.warnings),
        layout=ProbabilityRows(kind="probabilities", source_rows=rows),
    )
    return plan, ProbabilityLoader(patches, model.to(device), batch_size, device)


def weights_digest(checkpoint: Checkpoint) -> str:
    """sha256 over the averaged weights.

    What a checkpoint predicts, whatever its optimizer or seconds say.
    """
    found = hashlib.sha256()
    for name, value in sorted(checkpoint.part("average").items()):
        found.update(f"{name}\0{list(value.shape)}\0".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass
class ProbabilityLoader:
    """`load` of the builder: (split, job) -> the probabilities of that job's patches."""

    patches: Warehouse
    model: UNet
    batch_size: int
    device: torch.device

    @cached_property
    def _readers(self) -> dict[str, ChunkReader]:
        return {
            name: self.patches.split(name).reader(verify="always", keep=8)
            for name in self.patches.splits
        }

    def __call__(self, payload: tuple[str, int]) -> Block:
        name, chunk = payload
        reader = self._readers[name]
        size = self.patches.split(name).shard_samples
        indices = np.arange(chunk * size, min((chunk + 1) * size, len(reader.split)))
        found, decode, forward = [], 0.0, 0.0
        for start in range(0, len(indices), self.batch_size):
            at = time.perf_counter()
            pictures = read_samples(reader, ["image"], indices[start : start + self.batch_size])[
                "image"
            ]
            read = time.perf_counter()
            with torch.inference_mode():
                said = self.model(torch.from_numpy(pictures).to(self.device))
                found.append(said.float().softmax(dim=1).half().cpu().numpy())
            decode, forward = decode + read - at, forward + time.perf_counter() - read
        samples = ({"probability": row} for part in found for row in part)
        return Block(range(len(indices)), samples, {"decode": decode, "encode": forward}, {})


def patches_of(
    patches: Warehouse, probabilities: Warehouse, source: str
) -> Iterator[tuple[NDArray[np.float16], NDArray[np.uint8]]]:
    """(probability [classes, size, size], mask [size, size]) of a parent's patches, in their order;
    16 or so are in memory.
    """
    split, first, count = place_of(patches, source)
    readers = (
        probabilities.split(split).reader(access="pread", keep=4),
        patches.split(split).reader(access="pread", keep=4),
    )
    step = 16
    for start in range(first, first + count, step):
        indices = np.arange(start, min(start + step, first + count))
        said, known = (
            read_samples(readers[0], ["probability"], indices),
            read_samples(readers[1], ["mask"], indices),
        )
        yield from zip(said["probability"], known["mask"], strict=True)


def place_of(patches: Warehouse, source: str) -> tuple[str, int, int]:
    """(split, first index, patches) of a parent, whose patches follow one another."""
    table = patches.table(tables.SAMPLES, ["split", "index", "source"])
    at = np.flatnonzero(table["source"].to_numpy(zero_copy_only=False) == source)
    assert len(at) == at[-1] - at[0] + 1
    return str(table["split"][int(at[0])]), int(table["index"][int(at[0])].as_py()), len(at)


class ProbabilityRows(Rows):
    """The layout of probabilities: the patches' rows, under the probabilities' own digests."""

    def digested(self, plan: BuildPlan, digests: Mapping[str, Sequence[str]]) -> list[Any]:
        return [
            plan.recipe["model"],
            plan.recipe["source"]["digest"],
            [digest for part in digests.values() for digest in part],
        ]
