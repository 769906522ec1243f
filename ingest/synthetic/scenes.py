"""Scenes of discs, blocks and rings among clutter, drawn from nothing but a seed.

Boxes are learnable yet not trivial: objects overlap, sizes span a factor of ten, contrast varies,
and the clutter (strokes, blobs, hollow triangles, noise) is not labelled. One picture in 33 is
empty. Picture i follows from (seed, i) alone, so that a longer set begins with the shorter one.
Given up: realism; what is learnt here is of no use elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "Scene", "draw_masked", "draw_one", "draw_scene"]

CLASSES = ("disc", "block", "ring")
EMPTY_EVERY = 33
MOST_OBJECTS = 12
MOST_OVERLAP = 0.35
ATTEMPTS = 20
NOISE_DEVIATION = 6
Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels, the last two outside."""
Picture = NDArray[np.uint8]
"""uint8 [H, W, 3] RGB."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture with its boxes.

    Attributes
    ----------
    picture
        uint8 [H, W, 3] RGB.
    boxes_xyxy
        int64 [n, 4] in pixels; each side touches a pixel of the object.
    labels
        Indices into CLASSES.
    """

    picture: Picture
    boxes_xyxy: NDArray[np.int64]
    labels: tuple[int, ...]


def draw_scene(seed: int, index: int, size: tuple[int, int], *, single_box: bool = False) -> Scene:
    """Draw a scene with boxes.

    Parameters
    ----------
    seed, index
        Which scene to draw; nothing else influences it but the size.
    size
        Height and width in pixels.
    single_box
        Whether to draw exactly one object, always of the first class.
    """
    rng = np.random.default_rng([seed, index])
    picture = _background(rng, size)
    _clutter(rng, picture)
    if single_box:
        count = 1
    elif index % EMPTY_EVERY == EMPTY_EVERY - 1:
        count = 0
    else:
        count = int(rng.integers(1, MOST_OBJECTS + 1))

    boxes: list[Box] = []
    labels: list[int] = []
    for _ in range(count):
        box = _find_room(rng, size, boxes, single_box)
        if box is None:
            continue
        label = 0 if single_box else int(rng.integers(len(CLASSES)))
        _paint(rng, picture, box, label)
        boxes.append(box)
        labels.append(label)
    # Last, so that objects and background have the same noise and noise tells nothing about them.
    picture = _noisy(rng, picture)
    return Scene(picture, np.array(boxes, np.int64).reshape(-1, 4), tuple(labels))


def draw_one(seed: int, index: int, *, size: tuple[int, int]) -> tuple[Picture, int]:
    """Draw a picture of one object; return it with the object's class."""
    rng = np.random.default_rng([seed, index])
    picture, label = _background(rng, size), index % len(CLASSES)
    _clutter(rng, picture)
    box = _find_room(rng, size, [], True)
    assert box is not None
    _paint(rng, picture, box, label)
    return _noisy(rng, picture), label


def draw_masked(
    seed: int, index: int, *, size: tuple[int, int]
) -> tuple[Picture, NDArray[np.bool_]]:
    """Draw a picture; return it with a mask, bool [H, W], of where its objects are."""
    rng = np.random.default_rng([seed, index])
    picture = _background(rng, size)
    _clutter(rng, picture)
    mask = np.zeros(size, np.bool_)
    boxes: list[Box] = []
    for _ in range(int(rng.integers(2, MOST_OBJECTS + 1))):
        box = _find_room(rng, size, boxes, False)
        if box is not None:
            cover = _paint(rng, picture, box, int(rng.integers(len(CLASSES))))
            mask[box[1] : box[3], box[0] : box[2]] |= cover
            boxes.append(box)
    return _noisy(rng, picture), mask


def _noisy(rng: np.random.Generator, picture: Picture) -> Picture:
    noise = rng.normal(0, NOISE_DEVIATION, picture.shape)
    return np.clip(picture.astype(np.float64) + noise, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Picture:
    import cv2

    coarse = rng.integers(60, 190, (5, 5, 3)).astype(np.uint8)
    smooth: Picture = cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    return smooth


def _clutter(rng: np.random.Generator, picture: Picture) -> None:
    """Draw strokes, blobs and hollow triangles, which have no label."""
    import cv2

    height, width = picture.shape[:2]
    side = min(height, width)
    for _ in range(int(rng.integers(6, 18))):
        # The order of the draws decides every sample; it must not change.
        x, y = int(rng.integers(width)), int(rng.integers(height))
        colour = tuple(int(v) for v in rng.integers(30, 226, 3))
        reach = int(rng.integers(side // 30 + 2, side // 6 + 3))
        kind = int(rng.integers(3))
        if kind == 0:
            angle = rng.uniform(0, 2 * np.pi)
            end = (int(x + reach * np.cos(angle)), int(y + reach * np.sin(angle)))
            cv2.line(picture, (x, y), end, colour, int(rng.integers(1, 4)), cv2.LINE_AA)
        elif kind == 1:
            radius = int(rng.integers(1, side // 60 + 3))
            cv2.circle(picture, (x, y), radius, colour, -1, cv2.LINE_AA)
        else:
            corners = rng.integers(-reach // 2, reach // 2 + 1, (3, 2)) + np.array([x, y])
            outline = [corners.astype(np.int32)]
            thickness = int(rng.integers(1, 3))
            cv2.polylines(picture, outline, True, colour, thickness, cv2.LINE_AA)


def _find_room(
    rng: np.random.Generator,
    size: tuple[int, int],
    boxes: Sequence[Box],
    large: bool,
) -> Box | None:
    """Return a box that hides none of `boxes` and lies in none; None after some attempts."""
    height, width = size
    side = min(height, width)
    for _ in range(ATTEMPTS):
        low, high = (0.15, 0.5) if large else (0.05, 0.4)
        # Sizes even in their logarithm: as many small objects as large ones.
        extent = side * low * (high / low) ** rng.uniform()
        aspect = 2 ** rng.uniform(-0.5, 0.5)
        w, h = max(8, round(extent * aspect)), max(8, round(extent / aspect))
        x, y = int(rng.integers(0, max(1, width - w))), int(rng.integers(0, max(1, height - h)))
        box = (x, y, x + w, y + h)
        # An object that is mostly hidden would be a label that nobody can learn.
        if all(_covered(box, other) < MOST_OVERLAP for other in boxes):
            return box
    return None


def _covered(one: Box, other: Box) -> float:
    """Shared area over that of the smaller box."""
    w = min(one[2], other[2]) - max(one[0], other[0])
    h = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0, w) * max(0, h) / smaller


def _paint(rng: np.random.Generator, picture: Picture, box: Box, label: int) -> NDArray[np.bool_]:
    """Paint an object whose outermost pixels touch all four sides of its box.

    Returns
    -------
    NDArray
        bool [h, w]: which pixels of the box the object covers.
    """
    import cv2

    x1, y1, x2, y2 = box
    h, w = y2 - y1, x2 - x1
    cover = _cover(h, w, label)
    patch = picture[y1:y2, x1:x2]
    colour = rng.integers(0, 256, 3).astype(np.float64)
    # Push the colour away from what lies below, or the object could not be seen.
    below = patch.reshape(-1, 3).mean(axis=0)
    contrast = rng.uniform(45, 110)
    step = colour - below
    colour = np.clip(below + step * contrast / max(np.abs(step).max(), 1), 0, 255)
    shade = cv2.resize(rng.uniform(-14, 14, (3, 3)), (w, h), interpolation=cv2.INTER_LINEAR)
    patch[cover] = np.clip(colour + shade[:, :, None], 0, 255).astype(np.uint8)[cover]
    return cover


def _cover(height: int, width: int, label: int) -> NDArray[np.bool_]:
    if CLASSES[label] == "block":
        return np.ones((height, width), np.bool_)
    y, x = np.mgrid[0:height, 0:width]
    # Centres of pixels lie at half integers, so that discs touch all four sides of their box.
    across, down = (x + 0.5 - width / 2) / (width / 2), (y + 0.5 - height / 2) / (height / 2)
    radius: NDArray[np.float64] = np.hypot(across, down)
    if CLASSES[label] == "disc":
        return radius <= 1
    return (radius <= 1) & (radius >= 0.6)
