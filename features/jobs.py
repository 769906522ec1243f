"""A warehouse of pictures as a published version of features, made in micro-jobs.

    <split>/feature      f2 [sample, feature]          a stored chunk is a job
            feature_map  f2 [sample, feature, y, x]    if asked for; one sample an inner chunk
            target       i2 [sample]                   class of the picture, -1 where it has none

A job bakes one stored chunk with the builder's own task and marker, so a job that was killed is
done again and no other; whoever finishes the last one checks every chunk against its marker and
publishes. Samples keep their order and names. Batches never cross a job: what a job computes does
not depend on who ran it. Memory: the encoder, `batch_size` pictures on their way, a job's features.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from features.encoders.network import Encoder
from features.labels import read_labels
from features.settings import FeatureSettings
from utils.log import get_log
from warehouse.errors import TrainingError
from warehouse.format import manifest as tables
from warehouse.format.manifest import code_version, toolchain, version_name
from warehouse.format.schema import FORMAT_VERSION, ArraySpec, Codec
from warehouse.layouts.plan import Block, BuildPlan, SplitPlan
from warehouse.layouts.rows import Rows
from warehouse.read.chunks import ChunkReader
from warehouse.read.memory import read_samples
from warehouse.read.version import Warehouse

__all__ = ["FeatureLoader", "plan_features"]

log = get_log(__name__)
MOST = float(np.finfo(np.float16).max)


def plan_features(
    warehouse: Warehouse, encoder: Encoder, settings: FeatureSettings
) -> tuple[BuildPlan, FeatureLoader]:
    """The build of a version's features, and its `load`.

    Raises TrainingError for a warehouse without pictures.
    """
    if not {"image"} <= set(warehouse.manifest.arrays):
        raise TrainingError(
            "this warehouse holds no pictures",
            where=warehouse.location,
            remedy="build one with python -m scripts.build_zarr",
        )
    fingerprint = encoder.fingerprint()
    labels = "target" if "target" in warehouse.manifest.arrays else settings.picture_label
    recipe = {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "format": "features",
        "source": {"version": warehouse.version, "digest": warehouse.manifest.digest},
        "encoder": fingerprint,
        "settings": {
            **settings.content(),
            "labels": labels,
            "seed": settings.seed if encoder.random else None,
        },
    }
    version, key = version_name(recipe)
    grid = _grid(warehouse, encoder) if settings.feature_map else None
    splits, total = [], 0
    for name in warehouse.splits:
        samples = len(warehouse.split(name))
        total += samples
        chunks = -(-samples // settings.job_size)
        specs = _arrays(samples, settings.job_size, encoder.width, grid)
        splits.append(SplitPlan.of_chunks(name, specs, [(name, at) for at in range(chunks)]))
    manifest = warehouse.manifest
    summary = manifest.summary | {"encoder": fingerprint, "source": warehouse.version}
    rows = warehouse.table(tables.SAMPLES).to_pylist()

    plan = BuildPlan(
        version=version,
        key=key,
        recipe=recipe,
        toolchain=toolchain() | {"torch": torch.__version__},
        splits=tuple(splits),
        class_names=tuple(manifest.class_names),
        found=total,
        kept=total,
        summary=summary,
        warnings=tuple(manifest.warnings)
        + (("random features: the encoder was never trained",) if encoder.random else ()),
        layout=FeatureRows(kind="features", source_rows=rows),
    )
    return plan, FeatureLoader(warehouse, encoder, settings)


@dataclass
class FeatureLoader:
    """`load` of the builder: (split, job) -> that job's samples, encoded.

    Raises TrainingError for features that are of no use.
    """

    warehouse: Warehouse
    encoder: Encoder
    settings: FeatureSettings

    @cached_property
    def _readers(self) -> dict[str, ChunkReader]:
        return {
            name: self.warehouse.split(name).reader(verify="always", keep=8)
            for name in self.warehouse.splits
        }

    def __call__(self, payload: tuple[str, int]) -> Block:
        name, chunk = payload
        reader, size = self._readers[name], self.settings.job_size
        indices = np.arange(chunk * size, min((chunk + 1) * size, len(reader.split)))
        pooled, spatial, decode, forward, alike = [], [], 0.0, 0.0, True
        first: NDArray[Any] | None = None
        for start in range(0, len(indices), self.settings.batch_size):
            at = time.perf_counter()
            pictures = read_samples(
                reader, ["image"], indices[start : start + self.settings.batch_size]
            )["image"]
            first = pictures[0] if first is None else first
            alike = alike and bool((pictures == first).all())
            read = time.perf_counter()
            with torch.inference_mode():
                said = self.encoder(torch.from_numpy(pictures))
            pooled.append(said.pooled.numpy())
            if self.settings.feature_map:
                spatial.append(said.spatial.numpy())
            decode, forward = decode + read - at, forward + time.perf_counter() - read
        features = np.concatenate(pooled)
        self._check(features, alike, f"{name}, job {chunk}")
        rows = {
            "feature": features.astype(np.float16),
            "target": read_labels(reader, indices, self.settings.picture_label),
        }
        if spatial:
            rows["feature_map"] = np.ascontiguousarray(np.concatenate(spatial)).astype(np.float16)
            self._check(
                np.concatenate(spatial).reshape(len(indices), -1),
                alike,
                f"{name}, job {chunk}, feature_map",
            )
        samples = ({key: value[row] for key, value in rows.items()} for row in range(len(indices)))
        return Block(range(len(indices)), samples, {"decode": decode, "encode": forward}, {})

    def _check(self, features: NDArray[np.float32], alike: bool, where: str) -> None:
        if not np.isfinite(features).all() or np.abs(features).max() > MOST:
            raise TrainingError(
                "features do not fit float16",
                where=where,
                expected=f"finite, up to {MOST:.0f}",
                found=f"{np.abs(features).max()}",
                remedy="choose another --features.encoder",
            )
        if (
            not alike
            and float(features.astype(np.float16).std(axis=0, dtype=np.float64).max()) == 0
        ):
            raise TrainingError(
                "features without variance: every picture got the same vector",
                where=where,
                found=self.encoder.name,
                remedy="choose another --features.encoder",
            )


def _grid(warehouse: Warehouse, encoder: Encoder) -> tuple[int, int]:
    height, width = warehouse.manifest.arrays["image"].row[1:]
    with torch.inference_mode():
        shape = encoder(torch.zeros(1, 3, height, width, dtype=torch.uint8)).spatial.shape
    return int(shape[2]), int(shape[3])


def _arrays(
    samples: int, size: int, width: int, grid: tuple[int, int] | None
) -> tuple[ArraySpec, ...]:
    codec = Codec("lz4", 9, True, 2)
    specs = [
        ArraySpec(
            "feature",
            (samples, width),
            "float16",
            ("sample", "feature"),
            (size, width),
            None,
            codec,
            {"long_name": "pooled feature"},
        ),
        ArraySpec(
            "target",
            (samples,),
            "int16",
            ("sample",),
            (size,),
            None,
            codec,
            {"long_name": "class of the picture, -1 without one"},
        ),
    ]
    if grid is not None:
        row = (width, *grid)
        specs.append(
            ArraySpec(
                "feature_map",
                (samples, *row),
                "float16",
                ("sample", "feature", "y", "x"),
                (size, *row),
                (1, *row),
                Codec("lz4", 9, True, 2),
                {"long_name": "spatial feature"},
            )
        )
    return tuple(specs)


class FeatureRows(Rows):
    """The layout of features: the source's rows, under the features' own digests."""

    def root_attributes(self, plan: BuildPlan) -> dict[str, Any]:
        shared = super().root_attributes(plan)
        return shared | {"encoder": plan.recipe["encoder"], "summary": plan.summary}

    def group_attributes(
        self, plan: BuildPlan, split: SplitPlan, summary: Mapping[str, Any]
    ) -> dict[str, Any]:
        shared = super().root_attributes(plan)
        return shared | {"encoder": plan.recipe["encoder"], "split": split.name}

    def digested(self, plan: BuildPlan, digests: Mapping[str, Sequence[str]]) -> list[Any]:
        return [
            plan.recipe["encoder"],
            plan.recipe["source"]["digest"],
            [[name, len(part)] for name, part in digests.items()],
            [digest for part in digests.values() for digest in part],
        ]
