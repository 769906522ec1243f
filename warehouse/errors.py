"""Every error a user can meet, one line each: what, where, expected, found, and the command that
helps.

WarehouseError
├── ConfigError        a setting: unknown key, wrong type, impossible combination, a config file that does not parse
├── SourceError        the input as a whole: no pictures, ambiguous layout, changed while being read
│   ├── PictureError       one picture: unreadable, truncated, empty, mislabelled, too large
│   └── AnnotationError    one annotation file or box: does not parse, unknown class, too many boxes
├── ThresholdError     more refused, missing or empty sources than the thresholds allow
├── BuildError         the build could not go on: output root unusable, cluster lost
│   ├── SpaceError         not enough free space, or the disk filled up
│   └── LockedError        another build of the same version is running
├── StoreError         a warehouse that cannot be read
│   ├── NotAWarehouseError the path holds no published version
│   └── CorruptError       bytes that disagree with their digest, size or checksum
├── StateError         a loader, sampler or checkpoint state that belongs to something else
├── WorkerError        a loader worker that died, raised or hung
├── DatabaseError      a SQLite file of ours: locked, of a newer schema, not a database, damaged, or the disk refuses
└── TrainingError      training cannot go on: out of memory, loss not finite, store and model disagree
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AnnotationError",
    "BuildError",
    "ConfigError",
    "CorruptError",
    "DatabaseError",
    "LockedError",
    "NotAWarehouseError",
    "PictureError",
    "SourceError",
    "SpaceError",
    "StateError",
    "StoreError",
    "ThresholdError",
    "TrainingError",
    "WarehouseError",
    "WorkerError",
]


class WarehouseError(Exception):
    """Base of the tree. `str(error)` is always one line.

    what: the fault in plain words; where: the path, key or index concerned; expected / found: the
    two sides of a disagreement; remedy: what to type or change. All but `what` are optional and
    kept as attributes.
    """

    def __init__(
        self,
        what: str,
        *,
        where: Any = None,
        expected: Any = None,
        found: Any = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.remedy = (
            what,
            where,
            expected,
            found,
            remedy,
        )
        line = what if where is None else f"{what}: {where}"
        if expected is not None:
            line += f"; expected {expected}"
        if found is not None:
            line += f", found {found}" if expected is not None else f"; found {found}"
        if remedy:
            line += f"; {remedy}"
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between processes: keyword-only fields need a constructor that knows them.
        return _rebuild, (type(self), self.what, self.where, self.expected, self.found, self.remedy)


def _rebuild(
    kind: type[WarehouseError], what: str, where: Any, expected: Any, found: Any, remedy: str | None
) -> WarehouseError:
    return kind(what, where=where, expected=expected, found=found, remedy=remedy)


class ConfigError(WarehouseError, ValueError):
    """A setting is unknown, of the wrong type, impossible, or its file does not parse."""


class SourceError(WarehouseError):
    """The input as a whole cannot be used."""


class PictureError(SourceError):
    """One picture cannot be read. `reason` is the short word used in `rejected.jsonl`."""

    @property
    def reason(self) -> str:
        return self.what


class AnnotationError(SourceError):
    """One annotation file, or one box in it, cannot be used."""


class ThresholdError(WarehouseError):
    """More sources refused, missing or empty than `max_invalid`, `max_missing`, `max_empty_ratio`
    allow.
    """


class BuildError(WarehouseError):
    """The build cannot start or go on."""


class SpaceError(BuildError):
    """Not enough free space for what is to be written."""


class LockedError(BuildError):
    """Another process is building the same version."""


class StoreError(WarehouseError):
    """A warehouse cannot be read."""


class NotAWarehouseError(StoreError):
    """The path holds no published version."""


class CorruptError(StoreError):
    """Bytes disagree with their digest, size or checksum. `where` names the file."""


class StateError(WarehouseError, ValueError):
    """A loader, sampler or checkpoint state belongs to another version, batch size, seed or
    sampler.
    """


class WorkerError(WarehouseError):
    """A loader worker died, raised or hung."""


class DatabaseError(WarehouseError):
    """A SQLite file of ours is locked, of a newer schema, not a database, damaged, or cannot be
    written. `where` names it.
    """


class TrainingError(WarehouseError):
    """Training cannot go on."""
