"""The one set of pictures that everybody reads, in every reader's own format, below one working
folder.

Truth is `pixels.npy`: the decoded pictures in stored order. A reader has delivered everything when
the sum of its samples' crc32c is the sum over that file; the sum does not depend on order. A
format's folder exists only when it is complete (written beside, then renamed), so that an
interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from warehouse import Warehouse
from warehouse.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.settings import BenchSettings

__all__ = ["ROOT", "Jpegs", "Work", "crc_sum", "epoch_batches", "run_build"]

ROOT = Path(__file__).parents[1]
DRAWN = 256
JPEG_SIZE = (480, 640)
QUALITY_SIZE = "[16, 16]"

T = TypeVar("T")


class Work:
    """Where everything lies. Cheap to make again in a child process: `Work(settings)`."""

    def __init__(self, settings: BenchSettings) -> None:
        self.settings = settings
        height, width = settings.size
        source = Path(settings.pictures).resolve() if settings.pictures else "drawn"
        tag = hashlib.sha256(str(source).encode()).hexdigest()[:6]
        self.root = Path(settings.work).resolve() / f"{settings.samples}x{height}x{width}-{tag}"
        self.jpegs = self.root / "jpegs"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.settings.samples, 3, *self.settings.size)

    def path(self, name: str) -> Path:
        return self.root / name

    def split(self, name: str) -> Any:
        """The train split of warehouse `name`: lz4, none, quality."""
        return Warehouse.open(self.path(name)).split("train")

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [samples, 3, H, W], mapped from pixels.npy."""
        pixels: NDArray[np.uint8] = np.load(self.path("pixels") / "pixels.npy", mmap_mode="r")
        return pixels

    @cached_property
    def sources(self) -> list[Path]:
        """The JPEG of each sample, in stored order."""
        table = Warehouse.open(self.path("lz4")).table(
            "samples.parquet", ["split", "index", "source"]
        )
        rows = sorted(zip(table["index"].to_pylist(), table["source"].to_pylist(), strict=True))
        return [self.jpegs / source for _, source in rows]

    @cached_property
    def truth(self) -> dict[str, int]:
        truth: dict[str, int] = json.loads((self.path("pixels") / "truth.json").read_text())
        return truth

    def files(self, name: str) -> list[Path]:
        folder = self.path(name)
        return (
            sorted(path for path in folder.rglob("*") if path.is_file())
            if folder.is_dir()
            else [folder]
        )

    def disk_bytes(self, name: str) -> int:
        return sum(path.stat().st_size for path in self.files(name))

    def prepare(self, names: Iterable[str], log: Any) -> None:
        """Make the JPEGs, the truth and our own warehouses where they are missing.

        Peers' formats are written by their rows' writers.
        """
        self._make_jpegs(log)
        options: dict[str, dict[str, Any]] = {
            "lz4": {},
            "none": {"compressor": "none"},
            # Many small chunks, so that interleave and chunks_per_batch have something to mix.
            "quality": {
                "target_size": QUALITY_SIZE,
                "shard_samples": max(1, self.settings.samples // 32),
            },
        }
        # Every reader's order of the JPEGs comes from the lz4 version, so it is always needed.
        for name in ("lz4", *(name for name in options if name in set(names) - {"lz4"})):
            if not self.path(name).exists():
                log.info(f"baking {name}")
                self.write(name, partial(run_build, self, **options[name]))
        if not self.path("pixels").exists():
            self.write("pixels", self._write_pixels)

    def write(self, name: str, writer: Callable[[Path], T]) -> T:
        """`writer(target)` into a folder beside, renamed when it is done.

        What the writer returned.
        """
        target = self.root / f".{name}"
        shutil.rmtree(target, ignore_errors=True)
        result = writer(target)
        os.replace(target, self.path(name))
        return result

    def _write_pixels(self, target: Path) -> None:
        target.mkdir()
        array = self.split("lz4").array("image")
        out = np.lib.format.open_memmap(target / "pixels.npy", "w+", np.uint8, self.shape)
        for start in range(0, len(out), 256):
            out[start : start + 256] = array[start : start + 256]
        out.flush()
        (target / "truth.json").write_text(
            json.dumps({"samples": len(out), "crc_sum": crc_sum(out)})
        )

    def _make_jpegs(self, log: Any) -> None:
        if self.jpegs.exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        count = self.settings.samples
        if self.settings.pictures:
            folder = Path(self.settings.pictures)
        else:
            from ingest.synthetic.make import make_sample
            from ingest.synthetic.settings import SampleSettings

            folder = self.root / "drawn"
            log.info(f"drawing {min(DRAWN, count)} pictures")
            make_sample(SampleSettings(count=min(DRAWN, count), size=JPEG_SIZE, output=str(folder)))
        found = sorted(
            path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"}
        )
        if not found:
            raise ConfigError(
                "no JPEG to measure with",
                where=folder,
                remedy="give a folder of JPEGs as --bench.pictures, or leave it away",
            )
        temp = self.root / ".jpegs"
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        for at in range(count):
            shutil.copyfile(found[at % len(found)], temp / f"p{at:06d}.jpg")
        os.replace(temp, self.jpegs)


class Jpegs:
    """The JPEGs as a map-style dataset.

    Item i is uint8 [3, H, W], decoded and letterboxed as the build does it. Pickles as paths.
    """

    def __init__(self, work: Work) -> None:
        self.paths, self.size = [str(path) for path in work.sources], work.settings.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> Any:
        return decode(self.paths[at], self.size)


def decode(path: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """JPEG -> uint8 [3, H, W] on the canvas: libjpeg-turbo, area filter, the build's own code."""
    from ingest.pictures.images import decode_rgb
    from ingest.pictures.letterbox import letterbox_into, plan_letterbox

    picture, _ = decode_rgb(Path(path).read_bytes(), name=path, max_pixels=1 << 28)
    out = np.empty((3, *size), np.uint8)
    letterbox_into(
        picture, plan_letterbox(picture.shape[1], picture.shape[0], size, "letterbox"), out, 114
    )
    return out


def crc_sum(batch: Any) -> int:
    """Sum of the samples' crc32c: the same for any order of the same samples. batch.

    Uint8 [B, 3, H, W], array or tensor.
    """
    return sum(crc32c(np.ascontiguousarray(row).data) for row in np.asarray(batch))


def run_build(work: Work, target: Path, **options: object) -> float:
    """`build_zarr` as a user would call it, nothing cached; the seconds it reports.

    Raises ConfigError with its one line of error.
    """
    height, width = work.settings.size
    settings = {
        "input_root": work.jpegs,
        "output_root": target,
        "format": "folder",
        "target_size": f"[{height}, {width}]",
        "splits": '{"train": 1.0}',
        "workers": work.settings.workers,
        "rehash": "true",
        "if_exists": "clear",
    } | options
    command = [
        sys.executable,
        "-m",
        "scripts.build_zarr",
        *(word for key, value in settings.items() for word in (f"--build.{key}", str(value))),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            "the build under measurement failed",
            where=target,
            found=done.stderr.strip().split("\n")[-1][:300],
        )
    return float(json.loads(done.stdout.strip().split("\n")[-1])["seconds"])


def epoch_batches(
    samples: int, size: int, chunk: int, shuffle: bool, number: int
) -> list[NDArray[np.int64]]:
    """Index batches of one epoch.

    Each within one stored chunk of `chunk` samples, in a seeded random order.
    """
    from utils.samplers import ChunkBatchSampler

    full, rest = divmod(samples, chunk)
    sampler = ChunkBatchSampler([chunk] * full + [rest] * (rest > 0), size, shuffle=shuffle)
    sampler.set_epoch(number)
    return [np.asarray(batch) for batch in sampler]
