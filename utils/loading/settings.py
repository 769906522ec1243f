"""The `loader` section: how trainers read a split.

Purpose: `LoaderSettings`, and the names of the engines and stores that can be chosen.
Used by: benchmarks.ours, detector.inference.image_batches, detector.training,
  features.finetuning.run_finetuning, scripts._sections, scripts.finetune, scripts.infer_view,
  scripts.segment_patches, scripts.train_detector, scripts.train_vqvae, segmentation.training,
  utils.loader, utils.loading.options, utils.loading.stores, vqvae.training
Design notes: this module imports no torch, so that a command can print its `--help` quickly.
Assistant guidance: when extending: a new engine or store is added to its Literal here and to
  config.yaml.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from warehouse.section import Section

__all__ = ["Engine", "LoaderSettings", "Store"]

# There is no "fork": a fork copies locks that the threads of zarr hold, and deadlocks.
Engine = Literal["thread", "spawn", "inline"]

Store = Literal["auto", "mmap", "pread", "memory", "stream", "library"]


class LoaderSettings(Section):
    """How trainers read a split."""

    engine: Engine = Field(
        "thread",
        description=(
            "thread decodes in this process, spawn in worker processes, inline without concurrency."
        ),
    )
    num_workers: int = Field(
        2, ge=0, le=256, description="Number of decoding threads or processes; 0 means inline."
    )
    prefetch_factor: int = Field(
        2, ge=1, le=64, description="Number of batches that each worker prepares ahead."
    )
    store: Store = Field(
        "auto",
        description=(
            "How chunks are read: auto, mmap, pread, memory, stream or library; auto logs its"
            " choice."
        ),
    )
    prefetch: int = Field(
        2,
        ge=1,
        le=64,
        description="Number of stored chunks that are fetched ahead when store is stream.",
    )
    verify: Literal["first_touch", "always", "off"] = Field(
        "first_touch",
        description=(
            "When the checksum of an inner chunk is checked: the first time it is read,"
            " always, or never (off)."
        ),
    )
    worker_timeout: int = Field(
        25,
        ge=1,
        le=86_400,
        description=(
            "Seconds after which a spawned worker that does not answer is reported as hanging."
        ),
    )
    interleave: int = Field(
        1,
        ge=1,
        description=(
            "Number of stored chunks that are read alternately; a larger number shuffles more "
            "thoroughly but keeps more files open."
        ),
    )
    chunks_per_batch: int = Field(
        1, ge=1, description="Number of stored chunks whose samples are shuffled together."
    )
