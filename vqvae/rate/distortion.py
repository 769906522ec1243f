"""Rate and distortion: bytes as the store writes them, entropies, errors on one declared scale.

Rate: bits over the valid values of the features that a codec holds.

Distortion: over valid voxels of the continuous features, each error divided by its feature's range
(maximum - minimum over valid training voxels): PSNR = -10 log10 of the mean square of these, which
for one uint8 feature of full range is the usual PSNR with peak 255. `psnr_255` is over the peak
255, for features whose training range looks like bytes. Images are usually judged that way, and
narrow ranges make it the higher number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from utils.training.confusion import ConfusionMatrix
from vqvae.compress.codec import open_codec
from vqvae.rate.points import RatePoint
from warehouse.format import manifest as tables
from warehouse.format.inner_chunks import decode_into, encode, padded
from warehouse.format.schema import ArraySpec
from warehouse.layouts.features import Feature
from warehouse.read.version import Warehouse

__all__ = [
    "Distortion",
    "StoredRate",
    "entropy_bits",
    "feature_ranges",
    "is_byte",
    "packed",
    "packed_bytes",
    "stored_rate",
    "unpacked",
]


class StoredRate(TypedDict):
    """The size of a published version of codes.

    Attributes
    ----------
    bits_per_value
        Bits of every file of its Zarr store (chunks with their headers, and metadata) over the
        cube's valid values.
    values, float32_bytes
        Number of these values, and their bytes as float32.
    bytes_apart, bits_per_value_apart
        Of decoder, codebook and tables, which are not counted in `bytes`.
    """

    bits_per_value: float
    bytes: int
    values: int
    float32_bytes: int
    bytes_by_array: dict[str, int]
    bytes_apart: dict[str, int]
    bits_per_value_apart: dict[str, float]


def entropy_bits(codes: NDArray[Any], size: int) -> float:
    """Return the bits of an ideal code with the codes' own frequencies.

    Parameters
    ----------
    codes
        Integers below `size`, any shape.
    size
        How many codes there are.

    Notes
    -----
    Order 0: without context between positions, and without the table of
    frequencies.
    """
    # The bound for a coder without context. zstd can be below it, since it also finds repetitions
    # (docs/compression.md).
    counts = np.bincount(codes.reshape(-1), minlength=size).astype(np.float64)
    used = counts[counts > 0]
    return float(-(used * np.log2(used / counts.sum())).sum())


def packed(rows: NDArray[Any], spec: ArraySpec) -> list[bytes]:
    """Return the files that hold rows [n, *spec.shape[1:]], headers and checksums included."""
    size = spec.chunk[0]
    return [
        # Encoded exactly as the builder does, so that the report's bytes are those on disk.
        encode(padded(list(rows[first : first + size]), spec), spec.codec)
        for first in range(0, len(rows), size)
    ]


def unpacked(files: Sequence[bytes], spec: ArraySpec, count: int) -> NDArray[Any]:
    """Return the first `count` rows of the files of `packed`."""
    out = np.empty((len(files), *spec.chunk), spec.dtype)
    for file, rows in zip(files, out, strict=True):
        decode_into(memoryview(file), rows, spec.codec, True)
    return out.reshape(-1, *spec.chunk[1:])[:count]


def packed_bytes(rows: NDArray[Any], spec: ArraySpec) -> int:
    """Return the bytes of the files of `packed`."""
    return sum(map(len, packed(rows, spec)))


def feature_ranges(features: Sequence[Feature]) -> NDArray[np.float64]:
    """Return maximum - minimum of each feature over valid training voxels, at least 1e-6."""
    ranges = [(feature.maximum or 0.0) - (feature.minimum or 0.0) for feature in features]
    return np.array([max(size, 1e-6) for size in ranges])


def is_byte(feature: Feature) -> bool:
    """Return whether a feature's training values look like bytes.

    It is continuous, lies within 0..255, and spans more than an index such as
    NDVI does.
    """
    low, high = feature.minimum, feature.maximum
    if feature.kind != "continuous" or low is None or high is None:
        return False
    # 1.5 tells bytes from an index such as NDVI, which lies within -1..1.
    return low >= 0 and high <= 255 and high - low > 1.5


class Distortion:
    """Sums of errors over valid voxels.

    Parameters
    ----------
    features
        Of the last axis of the arrays that are added.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        self.features = tuple(features)
        self.continuous = self._of_kind("continuous")
        self.canopy = self._of_kind("canopy")
        self.ranges = feature_ranges(self.features)
        self.squared, self.absolute, self.count = (np.zeros(len(self.features)) for _ in range(3))
        self.confusion = {
            index: ConfusionMatrix(len(self.features[index].codes))
            for index in self._of_kind("categorical")
        }

    def _of_kind(self, kind: str) -> list[int]:
        return [index for index, feature in enumerate(self.features) if feature.kind == kind]

    def add(self, truth: NDArray[Any], guess: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        """Add blocks.

        Parameters
        ----------
        truth, guess
            [..., F] in physical units and codes.
        valid
            bool, the same shape.
        """
        for index, feature in enumerate(self.features):
            mask = valid[..., index]
            true_values, guesses = truth[..., index][mask], guess[..., index][mask]
            self.count[index] += true_values.size

            if feature.kind == "categorical":
                codes = np.sort(np.array(feature.codes, np.float32))
                rows = np.searchsorted(codes, true_values)
                self.confusion[index].add(rows, np.searchsorted(codes, guesses))
                continue

            # In float64: float32 sums over millions of voxels lose the small errors.
            error = guesses.astype(np.float64) - true_values
            self.squared[index] += np.square(error).sum()
            self.absolute[index] += np.abs(error).sum()

    @property
    def values(self) -> int:
        """Valid values of continuous features."""
        return int(self.count[self.continuous].sum())

    def figures(self) -> RatePoint:
        """Return the errors of all blocks added so far, as part of a point."""
        count = np.maximum(self.count, 1)
        rmse = np.sqrt(self.squared / count)
        byte_features = [index for index in self.continuous if is_byte(self.features[index])]
        figures: RatePoint = {
            "psnr": self._psnr(self.continuous, self.ranges),
            "rmse": {self.features[index].name: float(rmse[index]) for index in self.continuous},
            "psnr_255": self._psnr(byte_features, np.full(len(self.features), 255.0)),
        }

        if self.confusion:
            tables = self.confusion.values()
            figures["accuracy"] = float(np.mean([table.accuracy for table in tables]))
            figures["miou"] = float(np.mean([table.mean_iou for table in tables]))
        if self.canopy:
            errors = self.absolute[self.canopy] / count[self.canopy]
            figures["canopy_mae"] = float(errors.mean())
        return figures

    def _psnr(self, some: list[int], peaks: NDArray[np.float64]) -> float | None:
        """Return the PSNR of some features over their peaks, or None without values."""
        count = self.count[some].sum()
        if not count:
            return None
        mean_square = (self.squared[some] / peaks[some] ** 2).sum() / count
        # A lossless codec has no finite PSNR, and JSON has no infinity: 120 dB at most.
        return -10 * float(np.log10(max(mean_square, 1e-12)))


def stored_rate(codes: Path, checkpoint: str) -> StoredRate:
    """Return the size of a published version of codes.

    Parameters
    ----------
    codes
        Its folder.
    checkpoint
        The one it was made with, for the sizes of decoder and codebook.
    """
    warehouse = Warehouse.open(codes)
    rows = warehouse.table(tables.FILES, ["size", "array"]).to_pydict()
    by_array: dict[str, int] = {}
    for size, array in zip(rows["size"], rows["array"], strict=True):
        # zarr.json files count too: for a small cube they are a tenth of the bytes.
        name = "metadata" if array is None else array.split("/")[1]
        by_array[name] = by_array.get(name, 0) + size

    codec = open_codec(checkpoint, warehouse.manifest.recipe["checkpoint"])
    table_names = (tables.MANIFEST, *warehouse.manifest.tables)
    table_sizes = [(warehouse.folder / name).stat().st_size for name in table_names]
    # Needed once for any number of cubes, so they would make a small cube look bad and a large one
    # good.
    apart = {
        "decoder": codec.decoder_bytes,
        "codebook": codec.codebook_bytes,
        "tables": sum(table_sizes),
    }

    total = sum(by_array.values())
    values = sum(warehouse.manifest.summary["valid"])
    return {
        "bits_per_value": 8 * total / max(1, values),
        "bytes": total,
        "values": values,
        "float32_bytes": 4 * values,
        "bytes_by_array": by_array,
        "bytes_apart": apart,
        "bits_per_value_apart": {name: 8 * size / max(1, values) for name, size in apart.items()},
    }
