"""Inner chunks as bytes: the only module that encodes and decodes samples.

An inner chunk, and the whole file of an unsharded array, is `blosc(bytes) | crc32c`, little-endian.
Invariant: no byte is handed out whose crc32c or whose size in the Blosc header does not match.
Given up: codecs other than those that we write; `warehouse.format.compatibility` recognises them,
and zarr-python reads them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import blosc
from numpy.typing import NDArray

from warehouse.format.schema import ArraySpec, Codec

__all__ = ["CRC", "chunk_key", "decode_into", "encode", "fill_value", "padded", "parts_of"]

# Threaded Blosc holds the GIL, and its output depends on the thread count: 40 different outputs in
# 40 encodes were seen.
blosc.use_threads = False

CRC = struct.Struct("<I")
"""A crc32c as it stands at the end of an inner chunk, a file or an index."""

BLOSC_HEADER_BYTES = 16
# Uncompressed size, block size and compressed size, after four bytes of versions and flags.
_BLOSC_SIZES = struct.Struct("<III")


def fill_value(spec: ArraySpec) -> float | int | bool:
    """Return what stands in an array where a last, short stored chunk has no sample."""
    # Zarr and xarray show the fill value where a stored chunk is absent: NaN means missing there.
    if spec.name == "data":
        return float("nan")
    # 0 is a class.
    if spec.name == "label":
        return -1

    zero: float | int | bool = np.dtype(spec.dtype).type(0).item()
    return zero


def encode(array: NDArray[Any], codec: Codec) -> bytes:
    """Return an array as an inner chunk: little-endian bytes, Blosc if wanted, and a crc32c."""
    source = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    if codec.cname is None:
        body = source.tobytes()
    else:
        body = blosc.compress(
            source,
            codec.cname.encode(),
            codec.clevel,
            int(codec.shuffle),
            codec.blocksize,
            codec.typesize,
        )
    return body + CRC.pack(crc32c(body))


def decode_into(source: memoryview, out: NDArray[Any], codec: Codec, check: bool) -> None:
    """Decode one inner chunk straight into an array.

    Parameters
    ----------
    source
        The inner chunk with its crc32c.
    out
        The array that is filled, C-contiguous.
    check
        Whether the crc32c is compared.

    Raises
    ------
    ValueError
        The inner chunk does not match its crc32c or does not fit `out`, which is left as it was.
    """
    end = len(source) - 4
    body = source[:end]
    if check and crc32c(body) != CRC.unpack_from(source, end)[0]:
        raise ValueError("crc32c mismatch")
    if codec.cname is None:
        if end != out.nbytes:
            raise ValueError(f"inner chunk holds {end} bytes instead of {out.nbytes}")
        out.view(np.uint8).reshape(-1)[:] = np.frombuffer(body, np.uint8)
        return

    if end < BLOSC_HEADER_BYTES:
        raise ValueError("inner chunk is shorter than a Blosc header")
    # Before decoding: Blosc decodes an inner chunk of fewer bytes without complaint, and leaves
    # what an earlier sample left in the rest of the row.
    size, _, packed = _BLOSC_SIZES.unpack_from(source, 4)
    if size != out.nbytes or packed != end:
        raise ValueError(
            f"Blosc header says {size} bytes in {packed}, expected {out.nbytes} in {end}"
        )
    blosc.decompress(body, out)


def parts_of(row: NDArray[Any], spec: ArraySpec) -> list[NDArray[Any]]:
    """Return a sample as the inner chunks it is stored as, in order.

    The last one is filled up with the fill value.
    """
    # The usual case costs no copy.
    if spec.parts == 1:
        return [row]

    assert spec.inner is not None
    width = spec.inner[-1]
    room = np.full((*row.shape[:-1], spec.parts * width), fill_value(spec), row.dtype)
    room[..., : row.shape[-1]] = row
    return [
        np.ascontiguousarray(room[..., at * width : (at + 1) * width]) for at in range(spec.parts)
    ]


def padded(rows: Sequence[NDArray[Any]], spec: ArraySpec) -> NDArray[Any]:
    """Return rows of an unsharded array as one full stored chunk.

    What lies beyond the last row holds the fill value.
    """
    # Zarr stores every chunk in full size, also the last one of an array.
    out = np.full(spec.chunk, fill_value(spec), dtype=spec.dtype)
    for at, row in enumerate(rows):
        out[at] = row
    return out


def chunk_key(spec: ArraySpec, chunk: int) -> str:
    """Return the path of a stored chunk below its array's folder.

    Stored chunks are numbered in C order over the grid. The path is Zarr v3's default chunk key
    encoding.
    """
    if spec.grid is not None:
        return "/".join(["c", *(str(at) for at in np.unravel_index(chunk, spec.grid))])
    return "/".join(["c", str(chunk), *["0"] * (len(spec.shape) - 1)])
