"""What people look at.

Overlays, the page (self-contained, safe with any name), the curve, and `infer_view` end to end.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import SMALL
from PIL import Image

from detector.inference.overlay import FOUND, TRUTH, DetectedImage, draw_overlay
from detector.inference.page import write_page, write_view
from detector.inference.predictor import Predictor
from detector.model import make_model, to_float
from detector.settings import DetectorSettings
from detector.task import DataFacts, DetectorTask, data_facts, restore_detector
from detector.training_curve import draw_curve
from scripts import infer_view, train_detector
from scripts._command import run
from utils.loader import ChunkLoader
from utils.training.checkpoint import load_checkpoint, prefixed, save_checkpoint
from utils.training.task import seeded
from warehouse.errors import StateError, TrainingError

NASTY = "</script><script>alert(1)</script>&\"'\u2028é.jpg"


def shown(name="a.jpg", side=700, scores=(0.9, 0.2)):
    boxes = np.array([[100.0, 120.0, 300.0, 330.0], [400.0, 420.0, 500.0, 520.0]])[: len(scores)]
    truth = np.array([[90.0, 110.0, 310.0, 340.0]])
    return DetectedImage(
        name,
        np.full((side, side, 3), 128, np.uint8),
        boxes,
        np.array(scores),
        np.zeros(len(scores), np.int64),
        truth,
        np.zeros(1, np.int64),
    )


def colour_at(image, x, y):
    return image.getpixel((x, y))


def test_an_overlay_shows_truth_and_only_the_boxes_over_the_threshold():
    image = draw_overlay(shown(), ["cell"], 0.5)
    assert colour_at(image, 200, 330) == FOUND
    assert colour_at(image, 200, 340) == TRUTH
    assert colour_at(image, 450, 520) == (128, 128, 128)
    assert colour_at(draw_overlay(shown(), ["cell"], 0.1), 450, 520) == FOUND


def data_of(page: str) -> dict:
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_the_page_carries_everything_and_asks_for_nothing():
    page = write_page([shown(), shown("b.jpg", scores=())], ["cell"], 0.4, "two pictures")
    assert not re.search(
        r"""(?:src|href)\s*=\s*["']?(?!data:)\w|https?:|@import|url\(""",
        page.split('<script id="data"')[0],
    )
    assert "default-src 'none'" in page
    data = data_of(page)
    assert data["threshold"] == 0.4
    assert data["pictures"][0]["found"][0] == [100.0, 120.0, 300.0, 330.0, 0.9, "cell"]
    assert data["pictures"][1]["found"] == []
    assert data["pictures"][0]["jpeg"].startswith("/9j/")


def test_a_hostile_file_or_class_name_stays_text():
    page = write_page([shown(NASTY)], [NASTY], 0.4, NASTY)
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert data_of(page)["pictures"][0]["name"] == NASTY
    assert "&lt;/script&gt;" in page


def test_a_view_has_a_png_a_picture_and_names_that_stay_in_the_folder(tmp_path):
    page = write_view(
        [shown("../../etc/passwd.png"), shown(NASTY)], ["cell"], 0.5, tmp_path / "view", "t"
    )
    names = sorted(path.name for path in page.parent.iterdir())
    assert names[0] == "0000_passwd.png"
    assert len(names) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_that_is_a_file_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"--infer\.output"):
        write_view([shown()], [], 0.5, tmp_path / "file", "t")


def test_small_and_large_pictures_are_fitted_with_their_boxes(tmp_path):
    write_view([shown(side=3000), shown(side=600)], ["cell"], 0.5, tmp_path, "t")
    sizes = []
    for path in sorted(tmp_path.glob("*.png")):
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(1024, 1024), (640, 640)]
    found = data_of((tmp_path / "index.html").read_text())["pictures"][0]["found"][0]
    assert found[0] == pytest.approx(100 * 1024 / 3000, abs=0.06)


def test_a_curve_is_drawn_from_any_history(tmp_path):
    history = [
        {"epoch": 1, "loss": 3.0},
        {"epoch": 2, "loss": 2.0, "ap50": 0.5, "mean_iou": 0.4},
        {"epoch": 2.5, "loss": 1.0, "ap50": 0.6},
    ]
    draw_curve(history, tmp_path / "curve.png", "a run")
    with Image.open(tmp_path / "curve.png") as image:
        assert np.asarray(image).std() > 5


class Fixed(torch.nn.Module):
    """Says the same box for every picture."""

    def forward(self, picture):
        return picture

    def slots(self, predicted):
        from detector.model import Slots

        box = torch.tensor([[[0.25, 0.5, 0.75, 0.75]]]).expand(len(predicted), 1, 4)
        return Slots(box, torch.zeros(len(predicted), 1), torch.zeros(len(predicted), 1, 0))


def test_boxes_are_shown_on_the_part_of_the_canvas_that_is_picture():
    # A 200 x 100 source on a 64 x 64 canvas: 64 x 32, with 16 rows of padding above and below.
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    image[:, :, 16:48] = 200
    batch = {"image": image, "letterbox": torch.tensor([[0.32, 0.32, 0, 16, 200, 100]])}
    one = Predictor(Fixed(), DataFacts(1, ("a",), (64, 64)), torch.device("cpu")).predict(
        batch, ["a.png"]
    )[0]
    assert one.picture.shape == (32, 64, 3)
    assert one.picture.min() == 200
    np.testing.assert_allclose(one.box_xyxy, [[16, 16, 48, 32]], atol=1e-4)
    source = Predictor(Fixed(), DataFacts(1, ("a",), (64, 64)), torch.device("cpu")).predict(
        batch, ["a.png"], [np.zeros((100, 200, 3), np.uint8)]
    )[0]
    np.testing.assert_allclose(source.box_xyxy, [[50, 50, 150, 100]], atol=1e-3)


def test_a_checkpoint_gives_back_the_model_that_was_saved(tmp_path):
    with seeded(3):
        task = DetectorTask(
            DetectorSettings(model="big", width=8), DataFacts(5, ("a", "b"), (40, 48))
        )
    path = save_checkpoint(
        tmp_path, prefixed("average", task.model.state_dict()), {"model": task.describe()}
    )
    model, facts = restore_detector(load_checkpoint(path))
    picture = to_float(torch.randint(0, 255, (1, 3, 40, 48), dtype=torch.uint8))
    assert facts == task.facts
    assert torch.equal(model(picture).box_xyxy, task.model.eval()(picture).box_xyxy)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "huge"},
        {"width": 10**9},
        {"max_boxes": -1},
        {"facts": {}},
        {"width": "x"},
        {"class_count": 7},
    ],
    ids=["kind", "width", "slots", "no facts", "text", "another model"],
)
def test_a_checkpoint_of_something_else_is_a_state_error(tmp_path, change):
    task = DetectorTask(DetectorSettings(model="big", width=8), DataFacts(5, ("a", "b"), (40, 48)))
    path = save_checkpoint(
        tmp_path, prefixed("average", task.model.state_dict()), {"model": task.describe() | change}
    )
    with pytest.raises(StateError):
        restore_detector(load_checkpoint(path))


def test_models_start_the_same_from_the_same_seed_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two = (
        DetectorTask(DetectorSettings(model="tiny"), DataFacts(1, (), (64, 64))).model
        for _ in range(2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items()
    )
    assert make_model(kind="tiny").max_boxes == 1


def test_another_max_boxes_than_the_store_s_is_an_error_that_names_both(small):
    assert (
        data_facts(small.split("train"), DetectorSettings(max_boxes=3)).canvas == SMALL.target_size
    )
    with pytest.raises(
        TrainingError, match=r"expected 3 \(the store\), found 9 \(detector.max_boxes\)"
    ):
        data_facts(small.split("train"), DetectorSettings(max_boxes=9))


def command(module, capsys, *argv):
    code = run(module.main, module.Settings, module.__doc__, argv)
    captured = capsys.readouterr()
    return code, (json.loads(captured.out.splitlines()[-1]) if captured.out else None), captured.err


def test_the_commands_train_and_look_on_a_real_version(small, tmp_path, capsys):
    def train(folder, *more):
        return command(
            train_detector,
            capsys,
            "--detector.model",
            "big",
            "--detector.width",
            "8",
            "--detector.device",
            "cpu",
            "--detector.batch_size",
            "4",
            "--detector.evaluate_every",
            "9",
            "--detector.warehouse",
            str(small.folder),
            "--detector.output",
            str(tmp_path / folder),
            *more,
        )

    code, result, _ = train("whole", "--detector.epochs", "2")
    assert code == 0
    assert {
        "ap50",
        "map50",
        "ap",
        "checkpoint",
        "samples_per_second",
        "t_load_share",
    } <= result.keys()
    look = [
        "--infer.checkpoint",
        result["checkpoint"],
        "--infer.device",
        "cpu",
        "--infer.threshold",
        "0",
        "--infer.batch_size",
        "8",
    ]
    code, seen, _ = command(
        infer_view,
        capsys,
        *look,
        "--infer.input",
        str(small.folder),
        "--infer.output",
        str(tmp_path / "view"),
    )
    assert (code, seen["pictures"]) == (0, len(small.split("val")))
    assert data_of(Path(seen["path"]).read_text())["pictures"][1]["truth"] is not None
    Image.new("RGB", (90, 60), (200, 30, 30)).save(tmp_path / "one.png")
    code, seen, _ = command(
        infer_view,
        capsys,
        *look,
        "--infer.input",
        str(tmp_path / "one.png"),
        "--infer.output",
        str(tmp_path / "view"),
    )
    assert (code, seen["pictures"]) == (0, 1)
    code, seen, err = command(
        infer_view,
        capsys,
        *look,
        "--infer.input",
        str(tmp_path / "one.png"),
        "--infer.threshold",
        "1",
        "--infer.output",
        str(tmp_path / "view"),
    )
    assert (code, seen["boxes"]) == (0, 0)
    assert "no box scores 1 or more; the best score is 0." in err
    assert "--infer.threshold" in err


def test_training_without_a_warehouse_names_build_zarr(tmp_path, capsys):
    code, _, err = command(
        train_detector,
        capsys,
        "--detector.device",
        "cpu",
        "--detector.warehouse",
        str(tmp_path / "none"),
    )
    assert code == 1
    assert "build_zarr" in err
    assert "Traceback" not in err


def test_the_loader_s_state_carries_a_run_over_an_interruption_within_an_epoch(small, tmp_path):
    from utils.training.loop import Trainer
    from utils.training.ranks import Ranks

    def trainer(folder, stop=None, **changes):
        settings = DetectorSettings(
            model="big", width=8, epochs=2, batch_size=4, device="cpu", evaluate_every=9, **changes
        )
        task = DetectorTask(settings, data_facts(small.split("train"), settings))
        train, held_out = (
            ChunkLoader(small.split("train"), 4),
            ChunkLoader(small.split("val"), 4, shuffle=False),
        )
        made = Trainer(
            task,
            settings,
            train,
            held_out,
            tmp_path / folder,
            ranks=Ranks(0, 1, torch.device("cpu")),
        )
        if stop is not None:
            whole, calls = task.loss, iter(range(10**6))

            def loss(*arguments):
                made.schedule.stop = made.schedule.stop or next(calls) == stop
                return whole(*arguments)

            task.loss = loss
        return made

    trainer("whole").run()
    with pytest.raises(KeyboardInterrupt):
        trainer("parts", stop=4).run()
    trainer("parts", resume=True).run()
    one, two = (load_checkpoint(tmp_path / name).tensors for name in ("whole", "parts"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
