"""Class folders and pictures with masks, for trying classification and segmentation without data.

The pictures are those of `ingest.synthetic.scenes`, whose picture i follows from (seed, i) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["write_classes", "write_masks"]


def write_classes(
    output: Path,
    count: int,
    draw: Callable[[int], tuple[NDArray[np.uint8], int]],
    names: Sequence[str],
    progress: Callable[[int], None] | None,
) -> None:
    """Write `<output>/<class>/scene_<i>.jpg`.

    Parameters
    ----------
    draw
        i -> the picture, uint8 [H, W, 3] RGB, and its class.
    names
        Names of the classes.
    progress
        Called with numbers of pictures that are done.
    """
    for name in names:
        (output / name).mkdir()
    for index in range(count):
        picture, label = draw(index)
        _write(output / names[label] / f"scene_{index:05d}.jpg", picture[:, :, ::-1])
        if progress is not None:
            progress(1)


def write_masks(
    output: Path,
    count: int,
    draw: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.bool_]]],
    progress: Callable[[int], None] | None,
) -> None:
    """Write `<output>/images/scene_<i>.png` and `<output>/masks/scene_<i>.png`, 255 on objects.

    Parameters
    ----------
    draw
        i -> the picture, uint8 [H, W, 3] RGB, and where its objects are, bool [H, W].
    progress
        Called with numbers of pictures that are done.
    """
    for name in ("images", "masks"):
        (output / name).mkdir()
    for index in range(count):
        picture, mask = draw(index)
        _write(output / "images" / f"scene_{index:05d}.png", picture[:, :, ::-1])
        _write(output / "masks" / f"scene_{index:05d}.png", mask.astype(np.uint8) * 255)
        if progress is not None:
            progress(1)


def _write(path: Path, pixels: NDArray[Any]) -> None:
    import cv2

    # Encoded in memory: `cv2.imwrite` only returns False where a disk is full.
    done, data = cv2.imencode(path.suffix, pixels)
    assert done
    path.write_bytes(data.tobytes())
