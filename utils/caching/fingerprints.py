"""What a kept item depends on, and which transforms must not be cached.

Purpose: `CacheKey` and `fingerprint` identify what an item was made from; `refuse_random` rejects
  transforms that give another result each time.
Used by: utils.caching.cache_file, utils.caching.tensor_cache
Design notes: a fingerprint has the transform's settings, since its name alone does not tell which
  ones it has. Whether a transform is random cannot be proved: it goes by an attribute `random`,
  else by its name, and the cache also computes the first items twice.
Assistant guidance: when extending: what changes a fingerprint makes every kept file useless; a word
  added to RANDOM_WORDS refuses transforms that were cached before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, is_dataclass

from pydantic import BaseModel

from warehouse.errors import ConfigError

__all__ = ["FORMAT", "CacheKey", "fingerprint", "name_of", "refuse_random"]

FORMAT = b"TWCACHE1"
"""Names the layout of the cache's file; it is part of every key."""
RANDOM_WORDS = ("random", "augment", "jitter", "noise", "mixup", "cutmix", "dropout")


@dataclass(frozen=True, slots=True)
class CacheKey:
    """What a kept item depends on; a cache of another key is never read.

    Parameters
    ----------
    version, split
        The warehouse's version and split.
    transform
        The transform's name and settings, from `fingerprint`.
    """

    version: str
    split: str
    transform: str

    def digest(self, count: int) -> bytes:
        """Return the sha256 of the key, the file's format and the number of samples."""
        # The count is part of it, since it decides where the items begin in the file.
        parts = (FORMAT, self.version, self.split, self.transform, count)
        return hashlib.sha256(repr(parts).encode()).digest()


def fingerprint(transform: object) -> str:
    """Describe a transform for a `CacheKey`.

    Returns
    -------
    str
        The transform's own attribute `fingerprint`, or its qualified name and a digest of its
        settings (the fields of a dataclass or of a pydantic model).

    Raises
    ------
    ConfigError
        If the transform has none of these.
    """
    # A transform is foreign code: it may be any callable, with or without these attributes.
    own = getattr(transform, "fingerprint", None)
    if isinstance(own, str):
        return own

    kind = type(transform)
    if is_dataclass(transform) and not isinstance(transform, type):
        values = [(field.name, getattr(transform, field.name)) for field in fields(transform)]
        settings = repr(values)
    elif isinstance(transform, BaseModel):
        settings = transform.model_dump_json()
    else:
        raise ConfigError(
            "the transform has no fingerprint",
            where=name_of(transform),
            expected="a dataclass, a pydantic model or an attribute fingerprint",
            remedy="give it one that changes with its settings and its code",
        )
    return f"{kind.__module__}.{kind.__qualname__}({hashlib.sha256(settings.encode()).hexdigest()})"


def name_of(transform: object) -> str:
    """Return the transform's qualified name, for messages."""
    return str(getattr(transform, "__qualname__", None) or type(transform).__qualname__)


def refuse_random(transform: object) -> None:
    """Refuse a transform that is random, or a part of which is.

    Parameters
    ----------
    transform
        A callable, a list of them, or one that has its parts in `transforms` or `func`. None is
        allowed.

    Raises
    ------
    ConfigError
        If a part has ``random = True``, or a name that says so and not ``random = False``.
    """
    if transform is None:
        return
    if isinstance(transform, list | tuple):
        for part in transform:
            refuse_random(part)
        return

    # A declaration wins over the name: a deterministic class may well be called NoiseFilter.
    name, declared = name_of(transform), getattr(transform, "random", None)
    by_name = any(word in name.lower() for word in RANDOM_WORDS)
    if declared is True or (by_name and not isinstance(declared, bool)):
        raise ConfigError(
            "a random transform cannot be cached",
            where=name,
            remedy="cache what comes before it, or set cache_transformed_tensors: false; "
            "a transform that is not random declares it with an attribute random = False",
        )

    # torchvision's Compose has `transforms`, functools.partial has `func`.
    refuse_random(getattr(transform, "transforms", None))
    refuse_random(getattr(transform, "func", None))
