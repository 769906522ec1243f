"""Rate and distortion: bytes as the store writes them, entropies, errors on one declared scale.

Definitions. Rate: bits over the valid values of the features a codec holds. Distortion: over valid
voxels of the continuous features, each error divided by its feature's range (maximum - minimum over
valid training voxels): PSNR = -10 log10 of the mean square of these, which for one uint8 feature of
full range is the usual PSNR with peak 255. `psnr_255` beside it is over the peak 255, of features
that are bytes by their training range alone: pictures are usually judged so, and narrow ranges make
it the higher number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqvae.compress.encode import open_codec
from warehouse.format import manifest as tables
from warehouse.format.inner_chunks import decode_into, encode, padded
from warehouse.format.schema import ArraySpec
from warehouse.layouts.cube_geometry import Feature
from warehouse.read.version import Warehouse

__all__ = [
    "Distortion",
    "entropy_bits",
    "feature_ranges",
    "is_byte",
    "packed",
    "packed_bytes",
    "stored_rate",
    "unpacked",
]


def entropy_bits(codes: NDArray[Any], size: int) -> float:
    """Bits that an ideal code of the codes' own frequencies needs for all of them (order 0.

    No context, no table). codes: any shape.
    """
    counts = np.bincount(codes.reshape(-1), minlength=size).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(counts[counts > 0] * np.log2(share)).sum())


def packed(rows: NDArray[Any], spec: ArraySpec) -> list[bytes]:
    """The files that hold these rows, headers and checksums included. rows.

    [n, *spec.shape[1:]].
    """
    size = spec.chunk[0]
    return [
        encode(padded(list(rows[first : first + size]), spec), spec.codec)
        for first in range(0, len(rows), size)
    ]


def unpacked(files: Sequence[bytes], spec: ArraySpec, count: int) -> NDArray[Any]:
    """The first `count` rows of such files."""
    out = np.empty((len(files), *spec.chunk), spec.dtype)
    for file, rows in zip(files, out, strict=True):
        decode_into(memoryview(file), rows, spec.codec, True)
    return out.reshape(-1, *spec.chunk[1:])[:count]


def packed_bytes(rows: NDArray[Any], spec: ArraySpec) -> int:
    """Bytes of `packed`."""
    return sum(map(len, packed(rows, spec)))


def feature_ranges(features: Sequence[Feature]) -> NDArray[np.float64]:
    """maximum - minimum of each feature over valid training voxels, at least 1e-6."""
    return np.array([max((each.maximum or 0.0) - (each.minimum or 0.0), 1e-6) for each in features])


def is_byte(feature: Feature) -> bool:
    """Whether a feature's training values look like bytes.

    Continuous, within 0..255, wider than an index such as NDVI.
    """
    low, high = feature.minimum, feature.maximum
    return (
        feature.kind == "continuous"
        and low is not None
        and high is not None
        and low >= 0
        and high <= 255
        and high - low > 1.5
    )


class Distortion:
    """Sums of errors over valid voxels. truth, guess: [..., F] in physical units; valid: bool."""

    def __init__(self, features: Sequence[Feature]) -> None:
        self.features = tuple(features)
        self.continuous = [
            at for at, feature in enumerate(self.features) if feature.kind == "continuous"
        ]
        self.ranges = feature_ranges(self.features)
        self.squared, self.absolute, self.count = (np.zeros(len(self.features)) for _ in range(3))
        self.confusion = {
            at: np.zeros((len(each.codes),) * 2, np.int64)
            for at, each in enumerate(self.features)
            if each.kind == "categorical"
        }

    def add(self, truth: NDArray[Any], guess: NDArray[Any], valid: NDArray[np.bool_]) -> None:
        for at, feature in enumerate(self.features):
            mask = valid[..., at]
            one, other = truth[..., at][mask], guess[..., at][mask]
            self.count[at] += one.size
            if feature.kind == "categorical":
                codes = np.sort(np.array(feature.codes, np.float32))
                pairs = np.searchsorted(codes, one) * len(codes) + np.searchsorted(codes, other)
                self.confusion[at] += np.bincount(pairs, minlength=len(codes) ** 2).reshape(
                    len(codes), -1
                )
                continue
            error = other.astype(np.float64) - one
            self.squared[at] += np.square(error).sum()
            self.absolute[at] += np.abs(error).sum()

    @property
    def values(self) -> int:
        """Valid values of continuous features."""
        return int(self.count[self.continuous].sum())

    def figures(self) -> dict[str, Any]:
        """psnr in dB; psnr_255 in dB, of byte features (None without any); rmse {feature: physical
        units}; accuracy, miou (means over categorical features), canopy_mae."""
        count = np.maximum(self.count, 1)
        some = self.continuous
        rmse = {self.features[at].name: float(np.sqrt(self.squared[at] / count[at])) for at in some}
        out: dict[str, Any] = {"psnr": self._psnr(some, self.ranges), "rmse": rmse}
        out["psnr_255"] = self._psnr(
            [at for at in some if is_byte(self.features[at])], np.full(len(self.features), 255.0)
        )
        if self.confusion:
            scores = [_scores(table) for table in self.confusion.values()]
            out["accuracy"], out["miou"] = (
                float(np.mean(column)) for column in zip(*scores, strict=True)
            )
        canopy = [at for at, feature in enumerate(self.features) if feature.kind == "canopy"]
        if canopy:
            out["canopy_mae"] = float((self.absolute[canopy] / count[canopy]).mean())
        return out

    def _psnr(self, some: list[int], peaks: NDArray[np.float64]) -> float | None:
        """Of some features' errors over their peaks; None without values."""
        number = self.count[some].sum()
        if not number:
            return None
        return -10 * float(
            np.log10(max((self.squared[some] / peaks[some] ** 2).sum() / number, 1e-12))
        )


def _scores(confusion: NDArray[np.int64]) -> tuple[float, float]:
    """(accuracy, mean IoU over classes that occur) of a confusion matrix [truth, guess]."""
    right = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - right
    present = union > 0
    return float(right.sum() / max(1, confusion.sum())), float(
        (right[present] / union[present]).mean()
    ) if present.any() else 0.0


def stored_rate(codes: Path, checkpoint: str) -> dict[str, Any]:
    """What a published version of codes weighs: its own files, then decoder, codebook and tables
    apart.

    bits_per_value: of every file of its Zarr store (chunks with their headers, and metadata) over
    the cube's valid values.
    """
    warehouse = Warehouse.open(codes)
    rows = warehouse.table(tables.FILES, ["size", "array"]).to_pydict()
    recipe = warehouse.manifest.recipe
    codec = open_codec(checkpoint, recipe["checkpoint"])
    values = sum(warehouse.manifest.summary["valid"])
    by_array: dict[str, int] = {}
    for size, array in zip(rows["size"], rows["array"], strict=True):
        name = "metadata" if array is None else array.split("/")[1]
        by_array[name] = by_array.get(name, 0) + size
    total = sum(by_array.values())
    apart = {
        "decoder": codec.decoder_bytes,
        "codebook": codec.codebook_bytes,
        "tables": sum(
            (warehouse.folder / name).stat().st_size
            for name in (tables.MANIFEST, *warehouse.manifest.tables)
        ),
    }
    return {
        "bits_per_value": 8 * total / max(1, values),
        "bytes": total,
        "values": values,
        "float32_bytes": 4 * values,
        "bytes_by_array": by_array,
        "bytes_apart": apart,
        "bits_per_value_apart": {name: 8 * size / max(1, values) for name, size in apart.items()},
    }
