"""Dice, IoU and boundary F1 from bands, against readings of their definitions on the whole picture;
masks as PNG; sheets and page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt

from segmentation import mask_scores
from segmentation.mask_results import picture_names
from segmentation.mask_scores import MaskTally
from segmentation.mask_sheet import draw_curve, draw_sheet, write_mask, write_page

UNKNOWN = 255


def labels(
    shape: tuple[int, int], seed: int, classes: int, *, unknown: float = 0.0
) -> NDArray[np.uint8]:
    """Blocks of classes, so that there are boundaries and insides, with single strange pixels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (-(-shape[0] // 5), -(-shape[1] // 5)), np.uint8)
    out = np.kron(coarse, np.ones((5, 5), np.uint8))[: shape[0], : shape[1]]
    strange = rng.random(shape) < 0.05
    out[strange] = rng.integers(0, classes, int(strange.sum()), np.uint8)
    out[rng.random(shape) < unknown] = UNKNOWN
    return out


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def tally_of(
    said: NDArray[np.uint8], truth: NDArray[np.uint8], classes: int, tolerance: float = 2.0
) -> MaskTally:
    tally = MaskTally(classes, tolerance)
    tally.add(said.__getitem__, truth.__getitem__, len(said))
    return tally


def edge(label: NDArray[np.uint8], index: int) -> NDArray[np.bool_]:
    """Pixel by pixel: of the class, beside a pixel of another known class."""
    out = np.zeros(label.shape, bool)
    for y, x in np.argwhere(label == index):
        for b, a in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if (
                0 <= b < label.shape[0]
                and 0 <= a < label.shape[1]
                and label[b, a] not in (index, UNKNOWN)
            ):
                out[y, x] = True
    return out


def near_share(own: NDArray[np.bool_], other: NDArray[np.bool_], tolerance: float) -> float:
    if not own.any():
        return 0.0
    far = distance_transform_edt(~other) if other.any() else np.full(own.shape, np.inf)
    return float((far[own] <= tolerance + 1e-9).mean())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(2, 4),
    st.integers(0, 10**6),
    st.sampled_from([0, 0.5, 1, 1.5, 2, 3.7]),
    st.sampled_from([0.0, 0.2]),
    st.integers(1, 50),
)
def test_figures_are_those_of_their_definitions_however_the_picture_is_banded(
    height: int, width: int, classes: int, seed: int, tolerance: float, unknown: float, band: int
) -> None:
    said, truth = (
        labels((height, width), seed, classes),
        labels((height, width), seed + 1, classes, unknown=unknown),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_scores, "BAND", band)
        scores = tally_of(said, truth, classes, tolerance).scores()
    known = truth != UNKNOWN
    assert scores["pixels"] == known.sum()
    for index in range(classes):
        a, b = (said == index) & known, (truth == index) & known
        both, either, sizes = (a & b).sum(), (a | b).sum(), a.sum() + b.sum()
        assert scores["dice"][str(index)] == pytest.approx(2 * both / sizes if sizes else 1)
        assert scores["iou"][str(index)] == pytest.approx(both / either if either else 1)
        said_edge, true_edge = edge(said, index) & known, edge(truth, index) & known
        precision, recall = (
            near_share(said_edge, true_edge, tolerance),
            near_share(true_edge, said_edge, tolerance),
        )
        expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        if not said_edge.any() and not true_edge.any():
            expected = 1.0
        assert scores["boundary_f1"][str(index)] == pytest.approx(expected)


def test_a_mask_like_the_truth_scores_one_and_its_opposite_nothing() -> None:
    truth = labels((60, 70), 0, 2)
    assert {
        value
        for key in ("dice", "iou", "boundary_f1")
        for value in tally_of(truth, truth, 2).scores()[key].values()
    } == {1.0}
    scores = tally_of(1 - truth, truth, 2).scores()
    assert scores["dice"] == scores["iou"] == {"0": 0.0, "1": 0.0}


def test_a_boundary_moved_within_the_tolerance_is_found_and_beyond_it_is_not() -> None:
    truth = np.zeros((40, 40), np.uint8)
    truth[:, 20:] = 1
    moved = np.roll(truth, 3, axis=1)
    moved[:, :10], moved[:, 35:] = 0, 1
    assert tally_of(moved, truth, 2, 3.0).scores()["boundary_f1"] == {"0": 1.0, "1": 1.0}
    assert tally_of(moved, truth, 2, 2.9).scores()["boundary_f1"] == {"0": 0.0, "1": 0.0}


def test_pictures_add_up_pixel_by_pixel() -> None:
    pairs = [(labels((30, 41), at, 3), labels((30, 41), at + 50, 3)) for at in range(3)]
    total = MaskTally(3, 1.0)
    for said, truth in pairs:
        total.merge(tally_of(said, truth, 3, 1.0))
    gap = np.full((9, 41), UNKNOWN, np.uint8)  # pictures that do not touch, as one
    said = np.concatenate([part for pair in pairs for part in (pair[0], gap * 0)])
    truth = np.concatenate([part for pair in pairs for part in (pair[1], gap)])
    both = tally_of(said, truth, 3, 1.0).scores()
    assert total.scores()["dice"] == both["dice"]
    assert total.scores()["iou"] == both["iou"]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 20))
def test_a_mask_written_in_bands_is_read_by_pillow(
    tmp_path_factory: Any, height: int, width: int, band: int
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    path = tmp_path_factory.mktemp("png") / "mask.png"
    write_mask(path, (values[at : at + band] for at in range(0, height, band)), width, height)
    np.testing.assert_array_equal(pixels_of(path), values)


def test_a_sheet_shows_picture_truth_prediction_and_errors(tmp_path: Path) -> None:
    picture = np.full((8, 10, 3), 100, np.uint8)
    truth, said = np.zeros((8, 10), np.uint8), np.zeros((8, 10), np.uint8)
    truth[:, 7:], said[:, 8:], truth[0, 0] = 1, 1, UNKNOWN
    said[4, 2] = 1
    draw_sheet(tmp_path / "a.png", picture, said, truth, 2)
    sheet = pixels_of(tmp_path / "a.png")
    assert sheet.shape == (8, 4 * 10 + 3 * 6, 3)
    panels = [sheet[:, at * 16 : at * 16 + 10] for at in range(4)]
    np.testing.assert_array_equal(panels[0], picture)
    assert panels[1][0, 0].tolist() == [128, 128, 128], "unknown"
    assert panels[1][1, 7].tolist() == [255, 255, 255]
    assert panels[2][1, 7].tolist() == [0, 0, 0]
    assert panels[3][4, 2].tolist() == [213, 94, 0], "said where it is not"
    assert panels[3][1, 7].tolist() == [0, 114, 178], "the rarer class was missed"
    assert panels[3][0, 0].tolist() == panels[3][1, 1].tolist(), "unknown is no error"
    draw_sheet(tmp_path / "b.png", picture, said, None, 2)
    assert pixels_of(tmp_path / "b.png").shape == (8, 26, 3)


def test_the_page_escapes_names_and_says_which_pictures_have_no_truth(tmp_path: Path) -> None:
    scores = tally_of(labels((20, 20), 0, 2), labels((20, 20), 1, 2), 2).scores()
    pictures = [
        {
            "name": "<b>.png",
            "split": "test",
            "sheet": "sheets/a&b.png",
            "size": "20 x 20",
            "scores": scores,
        },
        {
            "name": "free.png",
            "split": "predict",
            "sheet": "sheets/free.png",
            "size": "20 x 20",
            "scores": None,
        },
    ]
    write_page(tmp_path / "index.html", pictures, {"test": scores}, 2)
    text = (tmp_path / "index.html").read_text()
    assert "&lt;b&gt;.png (test, 20 x 20)" in text
    assert "<b>.png" not in text
    assert 'src="sheets/a&amp;b.png"' in text
    assert "free.png (predict, 20 x 20): image, prediction. no truth" in text
    assert f"{scores['dice']['1']:.3f}" in text


def test_a_curve_is_drawn_also_of_epochs_that_were_not_scored(tmp_path: Path) -> None:
    draw_curve(
        [{"epoch": 1, "loss": 0.7}, {"epoch": 2, "loss": 0.4, "dice_0": 0.8, "dice_1": 0.9}],
        tmp_path / "curve.png",
        2,
    )
    assert pixels_of(tmp_path / "curve.png").std() > 10


def test_pictures_get_file_names_of_their_own() -> None:
    sources = [
        "images/a.png",
        "images/b.png",
        "images/a.jpg",
        "x y/ä.png",
        "../../c.png",
        "a b/c.png",
        "a_b/c.png",
        "A_B/c.png",
        "deep/" * 60 + "a.png",
        "deep/" * 60 + "b.png",
        ".png",
    ]
    names = picture_names(sources)
    assert names["images/b.png"] == "images_b"
    assert len({name.lower() for name in names.values()}) == len(sources)
    assert all(
        name == Path(name).name and not name.startswith(".") and len(name) < 200
        for name in names.values()
    )
