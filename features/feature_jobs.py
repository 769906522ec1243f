"""Encode a warehouse of images into a published version of features, in small jobs.

    <split>/feature      f2 [sample, feature]        a stored chunk is a job
            feature_map  f2 [sample, feature, y, x]  where asked for; an inner chunk is a sample
            target       i2 [sample]                 class of the image, -1 where it has none

A job writes one stored chunk with the builder's own task and marker, so that only a job that was
killed is done again; whoever finishes the last one checks every chunk against its marker and
publishes. Samples keep their order and names. Batches never cross a job, so that what a job
computes does not depend on who runs it; in exchange, a job's last batch may be short. Memory holds
the encoder, `batch_size` images, and the features of one job.
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
from features.image_labels import read_labels
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
    """Plan the build of a version's features.

    Parameters
    ----------
    warehouse
        A version of images.
    encoder, settings
        What they say of the features becomes part of the recipe.

    Returns
    -------
    tuple of BuildPlan and FeatureLoader
        The plan, and the `load` that computes its jobs.

    Raises
    ------
    TrainingError
        The warehouse holds no images.
    """
    if "image" not in warehouse.manifest.arrays:
        raise TrainingError(
            "this warehouse holds no images",
            where=warehouse.location,
            remedy="build one with python -m scripts.build_zarr",
        )
    recipe = _recipe(warehouse, encoder, settings)
    version, key = version_name(recipe)
    grid = _grid(warehouse, encoder) if settings.feature_map else None
    splits, total = [], 0
    for name in warehouse.splits:
        samples = len(warehouse.split(name))
        total += samples
        chunks = -(-samples // settings.job_size)
        specs = _arrays(samples, settings.job_size, encoder.width, grid)
        jobs = [(name, chunk) for chunk in range(chunks)]
        splits.append(SplitPlan.of_chunks(name, specs, jobs))

    manifest = warehouse.manifest
    summary = manifest.summary | {"encoder": recipe["encoder"], "source": warehouse.version}
    rows = warehouse.table(tables.SAMPLES).to_pylist()
    warnings = list(manifest.warnings)
    if encoder.random:
        warnings.append("random features: the encoder was never trained")
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
        warnings=tuple(warnings),
        layout=FeatureRows(kind="features", source_rows=rows),
    )
    return plan, FeatureLoader(warehouse, encoder, settings)


def _recipe(warehouse: Warehouse, encoder: Encoder, settings: FeatureSettings) -> dict[str, Any]:
    """Return the recipe that names a version of features."""
    # A class that the build stored is taken as it is. Then the setting decides nothing, and must
    # not give equal features another version.
    labels = "target" if "target" in warehouse.manifest.arrays else settings.picture_label
    return {
        "format_version": FORMAT_VERSION,
        "code_version": code_version(),
        "format": "features",
        "source": {"version": warehouse.version, "digest": warehouse.manifest.digest},
        "encoder": encoder.fingerprint(),
        "settings": {
            **settings.content(),
            "labels": labels,
            # Only random weights follow from the seed.
            "seed": settings.seed if encoder.random else None,
        },
    }


@dataclass
class FeatureLoader:
    """`load` of the builder: (split, job) -> that job's samples, encoded.

    Raises
    ------
    TrainingError
        The features are infinite, too large for float16, or the same for different images.
    """

    warehouse: Warehouse
    encoder: Encoder
    settings: FeatureSettings

    @cached_property
    def _readers(self) -> dict[str, ChunkReader]:
        # Every read is checked: a damaged image must not become a published feature.
        return {
            name: self.warehouse.split(name).reader(verify="always", keep=8)
            for name in self.warehouse.splits
        }

    def __call__(self, payload: tuple[str, int]) -> Block:
        name, chunk = payload
        reader, size = self._readers[name], self.settings.job_size
        indices = np.arange(chunk * size, min((chunk + 1) * size, len(reader.split)))
        pooled, spatial = [], []
        decode, forward = 0.0, 0.0
        first: NDArray[Any] | None = None
        all_identical = True
        for start in range(0, len(indices), self.settings.batch_size):
            begin = time.perf_counter()
            batch = indices[start : start + self.settings.batch_size]
            images = read_samples(reader, ["image"], batch)["image"]
            first = images[0] if first is None else first
            all_identical = all_identical and bool((images == first).all())
            decoded = time.perf_counter()

            with torch.inference_mode():
                encoded = self.encoder(torch.from_numpy(images))
            pooled.append(encoded.pooled.numpy())
            if self.settings.feature_map:
                spatial.append(encoded.spatial.numpy())
            decode += decoded - begin
            forward += time.perf_counter() - decoded

        features = np.concatenate(pooled)
        self._check(features, all_identical, f"{name}, job {chunk}")
        rows = {
            "feature": features.astype(np.float16),
            "target": read_labels(reader, indices, self.settings.picture_label),
        }
        if spatial:
            maps = np.concatenate(spatial)
            where = f"{name}, job {chunk}, feature_map"
            self._check(maps.reshape(len(indices), -1), all_identical, where)
            rows["feature_map"] = np.ascontiguousarray(maps).astype(np.float16)
        samples = ({key: value[row] for key, value in rows.items()} for row in range(len(indices)))
        return Block(range(len(indices)), samples, {"decode": decode, "encode": forward}, {})

    def _check(self, features: NDArray[np.float32], all_identical: bool, where: str) -> None:
        """Raise TrainingError for features [n, ...] of `where` that are of no use."""
        # Before anything is published: float16 would turn large values into infinity silently.
        if not np.isfinite(features).all() or np.abs(features).max() > MOST:
            raise TrainingError(
                "features do not fit float16",
                where=where,
                expected=f"finite, up to {MOST:.0f}",
                found=f"{np.abs(features).max()}",
                remedy="choose another --features.encoder",
            )
        # As stored: differences may vanish only in float16. Identical images have equal features.
        deviation = features.astype(np.float16).std(axis=0, dtype=np.float64)
        if not all_identical and float(deviation.max()) == 0:
            raise TrainingError(
                "features without variance: every image got the same vector",
                where=where,
                found=self.encoder.name,
                remedy="choose another --features.encoder",
            )


def _grid(warehouse: Warehouse, encoder: Encoder) -> tuple[int, int]:
    """Return height and width of the feature maps."""
    # By encoding one blank image: no rule holds for the strides and paddings of all encoders.
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
                codec,
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
        # The encoder and the images too: equal numbers of other origin are other features.
        return [
            plan.recipe["encoder"],
            plan.recipe["source"]["digest"],
            [[name, len(part)] for name, part in digests.items()],
            [digest for part in digests.values() for digest in part],
        ]
