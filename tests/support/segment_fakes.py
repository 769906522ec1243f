"""segment_patches as its command line runs it, and what its output folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from scripts import segment_patches
from scripts._command import run
from utils.jobs.queue import JobQueue
from warehouse import Warehouse

Outcome = tuple[int, dict[str, Any] | None, str]
SIZE, OVERLAP = 32, 8
SMALL = {
    "patch_size": SIZE,
    "overlap": OVERLAP,
    "width": 4,
    "levels": 2,
    "epochs": 3,
    "warmup_steps": 3,
    "device": "cpu",
}


def flags(folder: Path, output: Path, **more: Any) -> list[str]:
    values = {"input_root": folder, "output": output, **SMALL, **more}
    return [text for key, value in values.items() for text in (f"--segment.{key}", str(value))]


def call(*argv: str) -> int:
    return run(segment_patches.main, segment_patches.Settings, segment_patches.__doc__, argv)


def results(output: Path) -> Path:
    (folder,) = (path for path in output.glob("v*-ramp"))
    return folder


def digest(output: Path) -> str:
    return Warehouse.open(output / "probabilities").manifest.digest


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def pixels_of(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image)


def queue_rows(output: Path) -> list[dict[str, Any]]:
    (path,) = (output / "jobs").glob("*/jobs.db")
    with JobQueue(path) as queue:
        return queue.rows()
