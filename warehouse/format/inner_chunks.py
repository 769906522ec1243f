"""Inner chunks as bytes: the only code that encodes and decodes samples.

An inner chunk, and the whole file of an unsharded array, is `blosc(bytes) | crc32c`, little-endian.
Invariant: no byte is handed out whose crc32c or Blosc header size disagrees. Given up: codecs other
than those that we write; `warehouse.format.compatibility` recognises them, and zarr-python reads
them.
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
_BLOSC_SIZES = struct.Struct("<III")  # uncompressed size, block size, compressed size


def fill_value(spec: ArraySpec) -> Any:
    """What stands in padded places of a last, short stored chunk.

    NaN in cubes, where it means missing.
    """
    if spec.name == "data":
        return float("nan")
    return -1 if spec.name == "label" else np.dtype(spec.dtype).type(0).item()


def encode(array: NDArray[Any], codec: Codec) -> bytes:
    """The codecs of one inner chunk over a C-contiguous array.

    Little-endian bytes, Blosc unless cname is None, crc32c.
    """
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
    """Decode one inner chunk straight into `out` (C-contiguous). Raises ValueError(reason) before
    writing if anything is off.

    The header is compared with `out` first: a chunk that holds fewer bytes decodes without
    complaint and leaves the row's old tail.
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
    if end < 16:
        raise ValueError("inner chunk is shorter than a Blosc header")
    size, _, packed = _BLOSC_SIZES.unpack_from(source, 4)
    if size != out.nbytes or packed != end:
        raise ValueError(
            f"Blosc header says {size} bytes in {packed}, expected {out.nbytes} in {end}"
        )
    blosc.decompress(body, out)


def parts_of(row: NDArray[Any], spec: ArraySpec) -> list[NDArray[Any]]:
    """A sample as the inner chunks it is stored as, in order.

    The last one is filled up with the fill value.
    """
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
    """Rows of a plain array as one full stored chunk.

    Places beyond the last row hold the fill value.
    """
    out = np.full(spec.chunk, fill_value(spec), dtype=spec.dtype)
    for at, row in enumerate(rows):
        out[at] = row
    return out


def chunk_key(spec: ArraySpec, chunk: int) -> str:
    """The file of stored chunk `chunk` below the array's folder (Zarr v3 default key encoding), C
    order over the spec's grid.
    """
    if spec.grid is not None:
        return "/".join(["c", *(str(at) for at in np.unravel_index(chunk, spec.grid))])
    return "/".join(["c", str(chunk), *["0"] * (len(spec.shape) - 1)])
