"""Nested items as bytes and back: a JSON header that describes the structure, then the raw numbers.

Purpose: `encode_item` and `decode_item` keep any nesting of dicts, lists, tuples, numbers, strings,
  bytes, arrays and tensors, without pickle.
Used by: benchmarks.tensor_cache, utils.caching.cache_file, utils.caching.cached_passes,
  utils.caching.tensor_cache
Design notes: exact, type by type: an int stays an int, float32(1) a NumPy scalar, bfloat16 a
  bfloat16, NaN and -0.0 the same bits in arrays; dicts keep their order. What comes back is
  contiguous (C order), writeable and shares memory with nothing; two references to one array become
  two arrays. Subclasses, objects and anything else are refused by their place in the item, never
  guessed.
Assistant guidance: when extending: a new kind is a new tag; the header must stay readable without
  running code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warehouse.errors import ConfigError

__all__ = ["decode_item", "encode_item"]

# Well below the recursion limit, so that an item that contains itself ends in a clear message.
MOST_DEPTH = 64
DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
Buffers = list[Any]


def encode_item(item: Any) -> tuple[bytes, list[memoryview]]:
    """Describe an item, and point at its bytes.

    Parameters
    ----------
    item
        Dicts, lists, tuples, numbers, strings, bytes, arrays and tensors, in any nesting.

    Returns
    -------
    header : bytes
        UTF-8 JSON.
    buffers : list of memoryview
        The bytes of each leaf in the order of the header; not copied where the leaf is contiguous.

    Raises
    ------
    ConfigError
        If the item holds anything else; the message names its place in the item.
    """
    buffers: list[memoryview] = []
    header = _describe(item, "item", buffers, 0)
    return json.dumps(header, separators=(",", ":")).encode(), buffers


def decode_item(header: bytes, read: Callable[[Buffers], None]) -> Any:
    """Make an item again.

    Parameters
    ----------
    header
        The header, from `encode_item`.
    read
        Fills the writeable buffers that it is given, in order.

    Raises
    ------
    ValueError
        If the header is not one that `encode_item` makes.
    """
    # Leaves are allocated first and filled afterwards, so that a file can be read straight into
    # tensors that the caller keeps: one copy, and a single preadv for many leaves.
    leaves: Buffers = []
    build = _rebuild(json.loads(header), leaves)
    read(leaves)
    return build()


def _describe(value: Any, where: str, buffers: list[memoryview], depth: int) -> Any:
    if depth > MOST_DEPTH:
        raise ConfigError(
            "the item is nested too deeply to be cached",
            where=where,
            expected=f"at most {MOST_DEPTH} levels",
        )
    # The exact type, since a subclass would come back as its base class and lose what it adds.
    kind = type(value)
    if value is None or kind in {bool, str, float} or (kind is int and abs(value) < 1 << 63):
        return value
    if kind in {list, tuple}:
        return [
            "l" if kind is list else "t",
            *(
                _describe(part, f"{where}[{at}]", buffers, depth + 1)
                for at, part in enumerate(value)
            ),
        ]
    if kind is dict:
        pairs: list[Any] = []
        for key, part in value.items():
            if type(key) not in {str, int}:
                raise ConfigError(
                    "the item cannot be cached",
                    where=where,
                    expected="keys of type str or int",
                    found=repr(key)[:60],
                )
            # A flat list, because the keys of a JSON object are always strings.
            pairs += [key, _describe(part, f"{where}[{key!r}]", buffers, depth + 1)]
        return ["d", *pairs]
    if kind is bytes:
        buffers.append(memoryview(value))
        return ["b", len(value)]
    if kind is Tensor:
        return ["x", *_tensor(value, where, buffers)]
    if (kind is np.ndarray or isinstance(value, np.generic)) and not value.dtype.hasobject:
        array = np.ascontiguousarray(value)
        buffers.append(
            array.reshape(-1).view(np.uint8).data
            if array.size and array.dtype.itemsize
            else memoryview(b"")
        )
        return [
            "a" if kind is np.ndarray else "s",
            np.lib.format.dtype_to_descr(array.dtype),
            list(value.shape),
        ]
    raise ConfigError(
        "the item cannot be cached",
        where=where,
        expected="tensors, arrays, numbers, strings, lists, tuples, dicts",
        found=f"{kind.__module__}.{kind.__qualname__}",
        remedy="let the transform return one of these",
    )


def _tensor(value: Tensor, where: str, buffers: list[memoryview]) -> list[Any]:
    if (
        value.requires_grad
        or value.layout is not torch.strided
        or value.device.type != "cpu"
        or value.is_quantized
    ):
        raise ConfigError(
            "the tensor cannot be cached",
            where=where,
            expected="a dense tensor in host memory without gradient",
            found=f"{value.layout}, {value.device}, requires_grad {value.requires_grad}",
            remedy="move it to the device after the cache",
        )
    # A lazily conjugated or negated tensor holds the bytes of the original values.
    plain = value.contiguous().reshape(-1).resolve_conj().resolve_neg()
    buffers.append(plain.view(torch.uint8).numpy().data if plain.numel() else memoryview(b""))
    return [str(value.dtype).removeprefix("torch."), list(value.shape)]


def _rebuild(header: Any, leaves: Buffers) -> Callable[[], Any]:
    """Append the leaves of a value, and return what makes the value once they are filled."""
    if not isinstance(header, list):
        return lambda: header
    tag, *rest = header
    if tag in {"l", "t"}:
        parts = [_rebuild(part, leaves) for part in rest]
        return (
            (lambda: [part() for part in parts])
            if tag == "l"
            else (lambda: tuple(part() for part in parts))
        )
    if tag == "d":
        pairs = [(rest[at], _rebuild(rest[at + 1], leaves)) for at in range(0, len(rest), 2)]
        return lambda: {key: part() for key, part in pairs}
    if tag == "b":
        buffer = bytearray(rest[0])
        leaves.append(buffer)
        return lambda: bytes(buffer)
    if tag == "x":
        if any(type(side) is not int or side < 0 for side in rest[1]):
            # torch.empty would raise RuntimeError, which callers do not take for damage.
            raise ValueError(f"no shape of a tensor: {rest[1]!r}"[:80])
        tensor = torch.empty(rest[1], dtype=DTYPES[rest[0]])
        leaves.append(
            tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else bytearray()
        )
        return lambda: tensor
    if tag in {"a", "s"}:
        array = np.empty(rest[1], np.lib.format.descr_to_dtype(_tuples(rest[0])))
        leaves.append(
            array.reshape(-1).view(np.uint8) if array.size and array.dtype.itemsize else bytearray()
        )
        # Indexing a zero-dimensional array with () gives the NumPy scalar of its type.
        return (lambda: array) if tag == "a" else (lambda: array[()])
    raise ValueError(f"unknown tag {tag!r}")


def _tuples(descr: Any) -> Any:
    """Make tuples again of what JSON has turned into lists in a structured dtype's description."""
    if isinstance(descr, str):
        return descr
    return [
        tuple(tuple(part) if at == 2 else _tuples(part) for at, part in enumerate(field))
        for field in descr
    ]
