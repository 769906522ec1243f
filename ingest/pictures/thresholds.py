"""What may be refused: `max_invalid`, `max_missing` and `max_empty_ratio`.

A message names the counts, the first offenders, and the flag that would allow them. Both counts are
checked before anything is raised, so that whoever corrects one does not meet the other next time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ingest.pictures.judge import MISSING, SKIPPED
from ingest.pictures.validate import Scan
from ingest.records.base import Rejection
from ingest.records.formats import get_format
from warehouse.errors import ThresholdError
from warehouse.settings import BuildSettings

__all__ = ["check_thresholds"]

log = logging.getLogger(__name__)
MOST_SHOWN = 3


@dataclass(frozen=True, slots=True)
class _Excess:
    """A threshold that is exceeded, as the parts of an error."""

    what: str
    where: str
    expected: str
    found: int
    remedy: str


def check_thresholds(result: Scan, settings: BuildSettings) -> None:
    """Warn of what was refused, or raise.

    Raises
    ------
    ThresholdError
        If more was refused, missing or empty than the settings allow, or if nothing is left.
    """
    has_boxes = get_format(result.format).has_boxes
    exceeded = [_invalid(result, settings)]
    if has_boxes:
        # Pictures of class folders and masks have no annotation file that could be missing.
        exceeded.append(_missing(result, settings))
    _raise_if_any([each for each in exceeded if each is not None])
    if not result.records:
        raise ThresholdError(
            "no picture is left",
            expected="at least one",
            found=f"{result.found} found, all rejected",
            remedy=f"the first: {_offenders(result.rejected)}",
        )
    if has_boxes:
        _check_empty(result, settings)


def _invalid(result: Scan, settings: BuildSettings) -> _Excess | None:
    offenders = [
        item
        for item in result.rejected
        if item.kind == "picture" and item.reason not in (MISSING, SKIPPED)
    ]
    # The message must agree with the manifest, which stores the counts.
    assert len(offenders) == result.counts["invalid"]
    return _excess("invalid", settings.max_invalid, "pictures that cannot be used", offenders)


def _missing(result: Scan, settings: BuildSettings) -> _Excess | None:
    offenders = [item for item in result.rejected if item.reason in (MISSING, "missing_picture")]
    without, alone = result.counts["missing_annotations"], result.counts["missing_pictures"]
    what = f"{without} without annotation, {alone} annotations without picture"
    hint = ", or --build.missing_is_empty true to take such pictures as background"
    return _excess("missing", settings.max_missing, what, offenders, hint if without else "")


def _excess(
    name: str, allowed: int, what: str, offenders: Sequence[Rejection], hint: str = ""
) -> _Excess | None:
    count = len(offenders)
    if count > allowed:
        return _Excess(
            f"too many {name} sources ({what})",
            where=_offenders(offenders),
            expected=f"at most {allowed}",
            found=count,
            remedy=f"repair or remove them, or allow them with --build.max_{name} {count}{hint}",
        )
    if count:
        log.warning(
            "%d %s sources left out, as --build.max_%s %d allows: %s",
            count,
            name,
            name,
            allowed,
            _offenders(offenders),
        )
    return None


def _raise_if_any(exceeded: Sequence[_Excess]) -> None:
    if not exceeded:
        return
    # One error names all thresholds, so that correcting one does not reveal the next.
    first, *others = exceeded
    remedies = [first.remedy]
    remedies += [f"and {other.what}: {other.where}, {other.remedy}" for other in others]
    raise ThresholdError(
        first.what,
        where=first.where,
        expected=first.expected,
        found=first.found,
        remedy="; ".join(remedies),
    )


def _check_empty(result: Scan, settings: BuildSettings) -> None:
    empty = [record.source for record in result.records if not len(record.labels)]
    if not empty:
        return
    ratio = len(empty) / result.kept
    shown = ", ".join(empty[:MOST_SHOWN]) + (", ..." if len(empty) > MOST_SHOWN else "")
    text = f"{len(empty)} of {result.kept} kept pictures have no boxes ({shown})"
    if ratio > settings.max_empty_ratio:
        # Rounded up, so that the flag as printed is enough.
        enough = -(-len(empty) * 1000 // result.kept) / 1000
        raise ThresholdError(
            text,
            expected=f"a share of at most {settings.max_empty_ratio:g}",
            found=f"{ratio:.3f}",
            remedy=(
                f"allow it with --build.max_empty_ratio {enough:g}, or leave them out with"
                " --build.skip_empty true"
            ),
        )
    log.warning(text)


def _offenders(items: Sequence[Rejection]) -> str:
    shown = [
        f"{item.path} ({item.reason}{': ' + item.detail[:120] if item.detail else ''})"
        for item in items[:MOST_SHOWN]
    ]
    more = f" and {len(items) - MOST_SHOWN} more" if len(items) > MOST_SHOWN else ""
    return ", ".join(shown) + more
