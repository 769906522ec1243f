"""How a version of codes is laid out: one sample an inner chunk of the cube, in the cube's splits.

    <split>/codes   u1|u2 [sample, level, latent_t, latent_y, latent_x]
                          indices into the codebooks, in the smallest type that holds them
            valid   u1    [sample, byte]
                          bits of `valid` [time, y, x, feature], C order, first bit highest
            origin  i4    [sample, axis]
                          first voxel (t, y, x) in the cube

The inner chunks that lie in no split of the cube form a split `left_out`, so that the whole cube
can be decoded. A stored chunk is one Blosc-zstd buffer of `shard_samples` samples and is decoded as
a whole. What this gives up is reading single samples: an inner chunk for each would cost 36 bytes
of header, checksum and index entry for 200-600 bytes of codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from warehouse.format.inner_chunks import chunk_key, decode_into
from warehouse.format.schema import ArraySpec, Codec
from warehouse.layouts.plan import BuildPlan, ChunkResult, SplitPlan
from warehouse.layouts.rows import Rows

__all__ = ["CODES_SAMPLES_SCHEMA", "CodeRows", "code_arrays"]

CODES_SAMPLES_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("index", pa.int64()),
        ("t", pa.int64()),
        ("y", pa.int64()),
        ("x", pa.int64()),
        ("sha256", pa.string()),
    ]
)
"""Columns of samples.parquet.

t, y, x are the sample's first voxel in the cube; sha256 is of its decoded codes, valid and origin.
"""


def code_arrays(
    samples: int, size: int, levels: int, grid: Sequence[int], codebook_size: int, valid_bits: int
) -> tuple[ArraySpec, ...]:
    """Return the arrays of one split.

    Parameters
    ----------
    samples
        Samples of the split.
    size
        Samples of a stored chunk.
    grid
        Latent positions (t, y, x) of a sample.
    valid_bits
        Values of a sample, time * y * x * feature.
    """
    dtype = "uint8" if codebook_size <= 256 else "uint16"
    # Shuffled by bytes and not by bits: zstd's Huffman stage works on bytes, and bytes of equal
    # weight side by side beat planes of bits (docs/compression.md).
    codes = Codec("zstd", 9, dtype != "uint8", np.dtype(dtype).itemsize)

    def spec(
        name: str, row: tuple[int, ...], kind: str, axes: Sequence[str], codec: Codec, text: str
    ) -> ArraySpec:
        dims = ("sample", *axes)
        attributes = {"long_name": text}
        return ArraySpec(name, (samples, *row), kind, dims, (size, *row), None, codec, attributes)

    return (
        spec(
            "codes",
            (levels, *grid),
            dtype,
            ("level", "latent_t", "latent_y", "latent_x"),
            codes,
            "indices into the codebooks, first level first",
        ),
        spec(
            "valid",
            (-(-valid_bits // 8),),
            "uint8",
            ("byte",),
            Codec("zstd", 9),
            "bits of valid [time, y, x, feature], first bit highest",
        ),
        spec(
            "origin",
            (3,),
            "int32",
            ("axis",),
            Codec("zstd", 9, True, 4),
            "first voxel (time, y, x) in the cube",
        ),
    )


class CodeRows(Rows):
    """The layout of codes.

    The samples' first voxels, columns of samples.parquet, are read back from the stored codes.
    """

    schema: ClassVar[pa.Schema] = CODES_SAMPLES_SCHEMA

    def root_attributes(self, plan: BuildPlan) -> dict[str, object]:
        return {"layout": self.kind, "version": plan.version}

    def group_attributes(
        self, plan: BuildPlan, split: SplitPlan, summary: Mapping[str, object]
    ) -> dict[str, object]:
        # In the manifest alone: as attributes of every group they would weigh more than some
        # splits' codes.
        shown = {key: value for key, value in summary.items() if key != "codebook_rows"}
        return {
            "class_names": [],
            "layout": self.kind,
            "split": split.name,
            "summary": shown,
        }

    def summary(self, plan: BuildPlan, results: Sequence[ChunkResult]) -> dict[str, object]:
        valid = np.sum([result.facts["valid"] for result in results], axis=0)
        return plan.summary | {"valid": [int(count) for count in valid]}

    def sample_columns(
        self, plan: BuildPlan, digests: Mapping[str, Sequence[str]], store: Path
    ) -> dict[str, object]:
        parts: list[dict[str, NDArray[Any]]] = []
        for split in plan.splits:
            found = digests[split.name]
            origins = _origins(store, split, len(found))
            parts.append(
                {
                    "split": np.full(len(found), split.name),
                    "index": np.arange(len(found)),
                    "t": origins[:, 0],
                    "y": origins[:, 1],
                    "x": origins[:, 2],
                    "sha256": np.array(found),
                }
            )

        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def digested(self, plan: BuildPlan, digests: Mapping[str, Sequence[str]]) -> list[object]:
        # The checkpoint counts as content: the same numbers mean other blocks under another
        # decoder.
        return [
            plan.recipe["checkpoint"],
            plan.recipe["source"]["digest"],
            list(digests),
            [list(part) for part in digests.values()],
        ]


def _origins(store: Path, split: SplitPlan, samples: int) -> NDArray[np.int64]:
    """Return the first voxels, int64 [samples, 3], from the chunks just written."""
    spec = next(spec for spec in split.specs if spec.name == "origin")
    out = np.empty((len(split.payloads), *spec.chunk), spec.dtype)
    for chunk in range(len(out)):
        stored = (store / split.name / spec.name / chunk_key(spec, chunk)).read_bytes()
        decode_into(memoryview(stored), out[chunk], spec.codec, True)

    # The last stored chunk is padded to its full size.
    return out.reshape(-1, 3)[:samples].astype(np.int64)
