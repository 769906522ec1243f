"""Predict the class probabilities of a version of patches, as a published version of its own.

    <split>/probability   f2 [sample, class, y, x]   a stored chunk is a job

A stored chunk holds as many samples as one of the patches does.

The jobs are planned here and run by `utils.jobs`, like those of features: only a job that was
killed is done again, and several processes may share the queue. Batches never cross a job, so that
what a job computes does not depend on who runs it; in exchange, a job's last batch may be short.
The memory needed is that of the model, of one batch, and of the probabilities of one job.
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
    """Plan the build of every patch's probabilities.

    Parameters
    ----------
    patches
        A version of patches.
    model, checkpoint
        The network with its averaged weights, and the checkpoint that they are from.
    batch_size
        Patches of one forward pass.
    device
        None is the CPU. Its type is part of the recipe: another one rounds differently.

    Returns
    -------
    tuple of BuildPlan and ProbabilityLoader
        The plan, and the `load` that computes its jobs.

    Raises
    ------
    StateError
        The model was trained for other channels, classes or sizes than the patches have.
    """
    device = device or torch.device("cpu")
    _check_model(patches, model, checkpoint)

    # The batch size is part of the recipe, like the device: another one may round differently.
    recipe = {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "format": "probabilities",
        "source": {"version": patches.version, "digest": patches.manifest.digest},
        "model": {**model.describe(), "weights": weights_digest(checkpoint)},
        "settings": {"batch_size": batch_size, "device": device.type},
    }
    version, key = version_name(recipe)
    manifest = patches.manifest
    total = sum(len(patches.split(name)) for name in patches.splits)
    rows = patches.table(tables.SAMPLES, list(SAMPLES_SCHEMA.names)).to_pylist()
    plan = BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        toolchain=toolchain() | {"torch": torch.__version__},
        splits=tuple(_plan_split(patches, name) for name in patches.splits),
        class_names=tuple(manifest.class_names),
        found=total,
        kept=total,
        summary=manifest.summary,
        warnings=tuple(manifest.warnings),
        layout=ProbabilityRows(kind="probabilities", source_rows=rows),
    )
    return plan, ProbabilityLoader(patches, model.to(device), batch_size, device)


def _check_model(patches: Warehouse, model: UNet, checkpoint: Checkpoint) -> None:
    """Raise StateError where `model` does not fit the patches' channels, classes or size."""
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


def _plan_split(patches: Warehouse, name: str) -> SplitPlan:
    """Plan one split; its stored chunks are those of the patches, so that a job reads one."""
    split = patches.split(name)
    _, height, width = patches.manifest.arrays["image"].row
    row = (len(patches.manifest.class_names), height, width)
    spec = ArraySpec(
        "probability",
        (len(split), *row),
        "float16",
        ("sample", "class", "y", "x"),
        (split.shard_samples, *row),
        (1, *row),
        # Shuffled by two bytes: the exponents of neighbouring probabilities are alike.
        Codec("lz4", 1, True, 2),
        {"long_name": "probability of each class"},
    )
    chunks = [(name, chunk) for chunk in range(len(split.chunk_sizes))]
    return SplitPlan.of_chunks(name, [spec], chunks)


def weights_digest(checkpoint: Checkpoint) -> str:
    """Return the sha256 of the averaged weights, in hexadecimal digits."""
    digest = hashlib.sha256()
    # Only what predicts: the optimizer's state and the times of a run would give the same
    # probabilities another version name.
    for name, value in sorted(checkpoint.part("average").items()):
        digest.update(f"{name}\0{list(value.shape)}\0".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class ProbabilityLoader:
    """`load` of the builder: (split, job) -> the probabilities of that job's patches.

    Parameters
    ----------
    patches
        A version of patches.
    model
        On `device`, in eval mode.
    batch_size
        Patches of one forward pass.
    device
        Where the forward pass runs.
    """

    patches: Warehouse
    model: UNet
    batch_size: int
    device: torch.device

    @cached_property
    def _readers(self) -> dict[str, ChunkReader]:
        # Every read is checked: a damaged patch must not become a published probability.
        return {
            name: self.patches.split(name).reader(verify="always", keep=8)
            for name in self.patches.splits
        }

    def __call__(self, payload: tuple[str, int]) -> Block:
        name, chunk = payload
        reader = self._readers[name]
        size = self.patches.split(name).shard_samples
        indices = np.arange(chunk * size, min((chunk + 1) * size, len(reader.split)))
        batches, decode, forward = [], 0.0, 0.0
        for start in range(0, len(indices), self.batch_size):
            begin = time.perf_counter()
            batch = indices[start : start + self.batch_size]
            images = read_samples(reader, ["image"], batch)["image"]
            decoded = time.perf_counter()

            with torch.inference_mode():
                logits = self.model(torch.from_numpy(images).to(self.device))
                # The softmax in float32: only its result, in [0, 1], is fit for float16.
                batches.append(logits.float().softmax(dim=1).half().cpu().numpy())
            decode += decoded - begin
            forward += time.perf_counter() - decoded

        samples = ({"probability": row} for batch in batches for row in batch)
        return Block(range(len(indices)), samples, {"decode": decode, "encode": forward}, {})


def patches_of(
    patches: Warehouse, probabilities: Warehouse, source: str
) -> Iterator[tuple[NDArray[np.float16], NDArray[np.uint8]]]:
    """Yield the probabilities and the mask of each of a parent's patches, in their order.

    Parameters
    ----------
    patches, probabilities
        The two versions, with the same samples.
    source
        The parent's name in the table of samples.

    Yields
    ------
    tuple of arrays
        float16 [classes, size, size] and uint8 [size, size].
    """
    split, first, count = place_of(patches, source)
    readers = (
        probabilities.split(split).reader(access="pread", keep=4),
        patches.split(split).reader(access="pread", keep=4),
    )
    # 16 patches in memory at a time: the number of patches of a parent grows with its area.
    step = 16
    for start in range(first, first + count, step):
        indices = np.arange(start, min(start + step, first + count))
        probability = read_samples(readers[0], ["probability"], indices)["probability"]
        mask = read_samples(readers[1], ["mask"], indices)["mask"]
        yield from zip(probability, mask, strict=True)


def place_of(patches: Warehouse, source: str) -> tuple[str, int, int]:
    """Return where the patches of a parent are.

    Returns
    -------
    tuple of str, int and int
        The split, the index of the first patch in it, and the number of patches.
    """
    table = patches.table(tables.SAMPLES, ["split", "index", "source"])
    rows = np.flatnonzero(table["source"].to_numpy(zero_copy_only=False) == source)
    # `plan_patches` lists them parent by parent, so that a parent is decoded only once.
    assert len(rows) == rows[-1] - rows[0] + 1
    first = int(rows[0])
    return str(table["split"][first]), int(table["index"][first].as_py()), len(rows)


class ProbabilityRows(Rows):
    """The layout of probabilities: the patches' rows, under the probabilities' own digests."""

    def digested(self, plan: BuildPlan, digests: Mapping[str, Sequence[str]]) -> list[Any]:
        return [
            plan.recipe["model"],
            plan.recipe["source"]["digest"],
            [digest for part in digests.values() for digest in part],
        ]
