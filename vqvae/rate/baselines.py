"""Other codecs on the same held-out values: what a VQ-VAE has to beat, each with its real bytes.

All work on continuous features divided by their range, so that a mean square error is the one of
`distortion.py`. Each is charged the bits of `valid` too, as the codes are. The codecs themselves
are in `codecs/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vqvae.rate.codecs.base import Blocks, Coded, Sample, coded_points
from vqvae.rate.codecs.registry import CODECS
from vqvae.rate.codecs.streams import mask_bytes

__all__ = ["absent_baselines", "baseline_points"]


def baseline_points(train: Blocks, held: Blocks) -> Iterator[Coded]:
    """Measure every codec that can run here, at every rate.

    Parameters
    ----------
    train
        Blocks that bases are fitted on.
    held
        Blocks that are encoded.

    Yields
    ------
    Coded
        One point at a time, since `guess` is as large as `held.values`.
    """
    # One sample for all codecs, so that the mosaic is laid out and filled once.
    sample, mask = Sample(train, held), mask_bytes(held.valid)
    for codec in CODECS:
        if codec.missing() or codec.obstacle(train, held.mosaic):
            continue
        for coded in coded_points(codec, sample):
            yield replace(coded, bytes=coded.bytes + mask)


def absent_baselines(train: Blocks, held: Blocks) -> dict[str, str]:
    """Return the codecs that `baseline_points` leaves out, with the reason for each."""
    absent: dict[str, str] = {}
    for codec in CODECS:
        missing = codec.missing()
        if missing is not None:
            # Codecs of one package share one line of the report.
            absent[codec.family or codec.name] = missing
            continue
        obstacle = codec.obstacle(train, held.mosaic)
        if obstacle is not None:
            absent[codec.name] = obstacle
    return absent
