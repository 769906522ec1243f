"""The `loader` section: how trainers read a split.

Purpose: `LoaderSettings`, and the names of the engines and stores that can be chosen.
Used by: scripts._command, scripts.finetune, scripts.infer_view, scripts.segment_patches,
  scripts.train_detector, scripts.train_vqvae, utils.loader
Design notes: this module imports no torch, so that a command can print its `--help` quickly.
Assistant guidance: when extending: a new engine or store is added to its Literal here and to config.yaml.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from warehouse.settings import Section

__all__ = ["Engine", "LoaderSettings", "Store"]


Engine = Literal["thread", "spawn", "inline"]


Store = Literal["auto", "mmap", "pread", "memory", "stream", "library"]


class LoaderSettings(Section):
    """How trainers read a split."""

    engine: Engine = Field(
        "thread",
        description="thread decodes in this process, spawn in worker processes, inline without concurrency",
    )
    num_workers: int = Field(
        2, ge=0, le=256, description="decode threads or processes; 0 is inline"
    )
    prefetch_factor: int = Field(2, ge=1, le=64, description="batches in flight a worker")
    store: Store = Field(
        "auto",
        description="mmap, pread, memory (decoded once), stream (chunks fetched ahead), library (zarr-python); auto chooses and says why",
    )
    prefetch: int = Field(2, ge=1, le=64, description="stored chunks fetched ahead by store=stream")
    verify: Literal["first_touch", "always", "off"] = Field(
        "first_touch", description="when an inner chunk's crc32c is checked"
    )
    worker_timeout: int = Field(
        25,
        ge=1,
        le=86_400,
        description="seconds until a spawned worker that does not answer counts as hanging",
    )
    interleave: int = Field(
        1, ge=1, description="chunks read in turn; more is a finer shuffle and more open files"
    )
    chunks_per_batch: int = Field(
        1, ge=1, description="stored chunks whose samples are shuffled together"
    )
