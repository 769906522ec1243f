"""What a benchmark run measures, on how much, and where its files go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from warehouse.section import Section

__all__ = ["PARTS", "PEERS", "BenchSettings"]

Part = Literal["loaders", "cold", "build", "shuffle", "scale"]
Peer = Literal[
    "jpeg",
    "zarr",
    "memmap",
    "tensordict",
    "tensorstore",
    "xbatcher",
    "webdataset",
    "litdata",
    "mds",
    "ffcv",
]
PARTS: tuple[Part, ...] = ("loaders", "cold", "build", "shuffle", "scale")
PEERS: tuple[Peer, ...] = (
    "jpeg",
    "zarr",
    "memmap",
    "tensordict",
    "tensorstore",
    "xbatcher",
    "webdataset",
    "litdata",
    "mds",
    "ffcv",
)


class BenchSettings(Section):
    """What `bench_loader` measures.

    The defaults give the figures of docs/log.md: 2,048 pictures of 3 x 384 x 384 uint8, LZ4,
    batches of 64, shuffled, 2 workers and a warm page cache.
    """

    work: str = Field(
        "artifacts/bench",
        description="Folder for each reader's copy of the images; about 8 GB at the default size.",
    )
    output: str = Field(
        "artifacts/bench/result", description="Folder for bench.json and bench.png."
    )
    pictures: str | None = Field(
        None,
        description=(
            "Folder of JPEG files, which are repeated until there are bench.samples images; null "
            "generates images."
        ),
    )
    samples: int = Field(2048, ge=8, le=1 << 20, description="Number of samples.")
    size: tuple[int, int] = Field(
        (384, 384), description="Height and width of the images in pixels."
    )
    batch_size: int = Field(64, ge=1, le=4096, description="Samples per batch.")
    shuffle: bool = Field(True, description="Read in shuffled order.")
    workers: int = Field(
        2,
        ge=1,
        le=64,
        description="Number of threads or processes of each reader and writer that uses several.",
    )
    peers: tuple[Peer, ...] | None = Field(
        None, description="Other readers to measure; null measures all of them, [] none."
    )
    rows: tuple[str, ...] | None = Field(
        None,
        description=(
            "Run only benchmarks (rows of the result table) whose name contains one of these "
            "words; null means all."
        ),
    )
    parts: tuple[Part, ...] = Field(PARTS, description="Parts of the benchmark to run.")
    repeats: int = Field(
        5,
        ge=1,
        le=100,
        description=(
            "Number of interleaved rounds; each benchmark runs once per round in a new process."
        ),
    )
    seconds: float = Field(
        1.0,
        ge=0,
        le=60,
        description="Shortest duration of a run in seconds; a run consists of whole epochs.",
    )
    build_repeats: int = Field(
        3,
        ge=1,
        le=20,
        description="Number of interleaved rounds of the build and of the other writers.",
    )
    timeout: float = Field(
        900,
        gt=0,
        description="Seconds after which a benchmark is stopped and listed as missing.",
    )

    @field_validator("size")
    @classmethod
    def _size_is_sane(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not all(8 <= side <= 4096 for side in value):
            raise ValueError(
                f"both sides (H, W) must be between 8 and 4096 pixels, not {list(value)}"
            )
        return value

    def wants(self, peer: str | None) -> bool:
        """Whether a row of `peer` (None: one of our own or a limit) was asked for."""
        return peer is None or self.peers is None or peer in self.peers
