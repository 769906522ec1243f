"""Every error that a user can meet.

Each is one line: what happened, where, what was expected and found, and what helps. A mistake of
the user's never ends in a traceback; an `assert` marks a bug of ours.

WarehouseError
├── ConfigError        a setting or a config file: unknown, of the wrong type, impossible
├── SourceError        the input as a whole: no images, ambiguous, changed while being read
│   ├── PictureError       one image: unreadable, truncated, empty, mislabelled, too large
│   └── AnnotationError    one annotation file or box: does not parse, unknown class, too many boxes
├── ThresholdError     more refused, missing or empty sources than the thresholds allow
├── BuildError         the build cannot continue: output root unusable, cluster lost
│   ├── SpaceError         not enough free space, or the disk filled up
│   └── LockedError        another build of the same version is running
├── StoreError         a warehouse that cannot be read
│   ├── NotAWarehouseError the path holds no published version
│   └── CorruptError       bytes that disagree with their digest, size or checksum
├── StateError         a loader, sampler or checkpoint state that belongs to something else
├── WorkerError        a loader worker that died, raised or hung
├── DatabaseError      a SQLite file of ours: locked, damaged, of a newer schema, no database
└── TrainingError      training cannot continue: out of memory, loss not finite, wrong store
"""

from __future__ import annotations

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

    Parameters
    ----------
    what
        The fault in plain words.
    where
        The path, key or index concerned.
    expected, found
        The two sides of a disagreement.
    remedy
        What to type or change.

    Notes
    -----
    All are kept as attributes, so that a program need not parse the message.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy
        line = what if where is None else f"{what}: {where}"
        if expected is not None:
            line += f"; expected {expected}"
        if found is not None:
            line += f", found {found}" if expected is not None else f"; found {found}"
        if remedy:
            line += f"; {remedy}"
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors travel between processes: keyword-only fields need a constructor that knows them.
        return _rebuild, (type(self), self.what, self.where, self.expected, self.found, self.remedy)


def _rebuild(
    kind: type[WarehouseError],
    what: str,
    where: object,
    expected: object,
    found: object,
    remedy: str | None,
) -> WarehouseError:
    return kind(what, where=where, expected=expected, found=found, remedy=remedy)


class ConfigError(WarehouseError, ValueError):
    """A setting is unknown, of the wrong type, impossible, or its file does not parse."""


class SourceError(WarehouseError):
    """The input as a whole cannot be used."""


class PictureError(SourceError):
    """One image cannot be read. `reason` is the short word used in `rejected.jsonl`."""

    @property
    def reason(self) -> str:
        return self.what


class AnnotationError(SourceError):
    """One annotation file, or one box in it, cannot be used."""


class ThresholdError(WarehouseError):
    """More sources are refused, missing or empty than the thresholds of the build allow.

    The thresholds are `max_invalid`, `max_missing` and `max_empty_ratio`.
    """


class BuildError(WarehouseError):
    """The build cannot start or continue."""


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
    """A loader, sampler or checkpoint state belongs to something else.

    That is another version, batch size, seed or sampler.
    """


class WorkerError(WarehouseError):
    """A loader worker died, raised or hung."""


class DatabaseError(WarehouseError):
    """A SQLite file of ours cannot be used. `where` names it.

    It is locked, of a newer schema, no database, damaged, or cannot be written.
    """


class TrainingError(WarehouseError):
    """Training cannot continue."""
