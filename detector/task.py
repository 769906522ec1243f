"""The detectors as a task of the training loop.

Everything that a detector needs to know about its data is in `DataFacts`, which is read from the
warehouse: box slots, classes and canvas. Augmentation runs on batches on their device and depends
on seed, epoch and sample index only, so that it is the same for any number of workers and ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detector.evaluate import DetectionTally
from detector.losses import LossWeights, big_loss, largest_box, make_truth, tiny_loss
from detector.model import BigDet, TinyDet, make_model, reduced, to_float
from detector.settings import DetectorSettings
from utils.augment import augment
from utils.training.checkpoint import Checkpoint, known_model, load_module
from utils.training.settings import AugmentSettings
from utils.training.task import Task, seeded
from warehouse.errors import StateError, TrainingError
from warehouse.read.version import Split

__all__ = ["DataFacts", "DetectorTask", "data_facts", "restore_detector"]


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What a detector has to know about the data it was trained on.

    Attributes
    ----------
    max_boxes
        Box slots per image in the warehouse.
    class_names
        Names of the classes, by label.
    canvas
        Height and width in pixels.
    pad_value, resize_mode
        How images are fitted to the canvas.
    """

    max_boxes: int
    class_names: tuple[str, ...]
    canvas: tuple[int, int]
    pad_value: int = 114
    resize_mode: str = "letterbox"


def data_facts(split: Split, settings: DetectorSettings) -> DataFacts:
    """Read the facts of a split.

    Raises
    ------
    TrainingError
        If the split has no boxes, or another number of box slots than `detector.max_boxes`.
    """
    recipe = split.warehouse.manifest.recipe.get("settings", {})
    if split.max_boxes is None:
        raise TrainingError(
            "this warehouse has no boxes",
            where=split.warehouse.folder,
            remedy="build one from VOC, COCO or YOLO pictures",
        )
    if settings.max_boxes not in {None, split.max_boxes}:
        raise TrainingError(
            "detector.max_boxes and the store's max_boxes differ",
            where=split.warehouse.folder,
            expected=f"{split.max_boxes} (the store)",
            found=f"{settings.max_boxes} (detector.max_boxes)",
            remedy="leave --detector.max_boxes away, or build again with --build.max_boxes",
        )
    height, width = split.specs["image"].shape[2:]
    return DataFacts(
        split.max_boxes,
        tuple(split.class_names),
        (height, width),
        int(recipe.get("pad_value", 114)),
        str(recipe.get("resize_mode", "letterbox")),
    )


class DetectorTask(Task):
    """TinyDet or BigDet with its loss and metrics; see `utils.training.task.Task`."""

    section = "detector"
    headline = ("ap50", "max")
    model: BigDet | TinyDet

    def __init__(self, settings: DetectorSettings, facts: DataFacts) -> None:
        self.settings, self.facts = settings, facts
        self.name, self.lr = ("TinyDet", 5e-3) if settings.model == "tiny" else ("BigDet", 2e-3)
        with seeded(settings.seed):
            self.model = make_model(
                kind=settings.model,
                max_boxes=facts.max_boxes,
                class_count=len(facts.class_names),
                width=settings.width,
            )
        # Strong augmentation made TinyDet learn more slowly, and it has little time.
        strength = settings.strength
        if strength is None:
            strength = float(settings.model == "big")
        amounts = {
            key: strength * getattr(settings, key)
            for key in ("zoom", "aspect", "brightness", "contrast", "saturation")
        }
        self.augmentation = AugmentSettings(
            flip_x=settings.flip_x, flip_y=settings.flip_y, **amounts
        )
        self.weights = LossWeights(box_l1=settings.box_l1, box_giou=settings.box_giou)

    def loss(
        self, model: nn.Module, batch: dict[str, Tensor], epoch: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the loss over an augmented batch, and its terms."""
        if self.settings.model == "tiny":
            # Before augmentation, which then has a quarter of the pixels to move.
            batch = {**batch, "image": reduced((to_float(batch["image"]) + 1) / 2)}
        batch = augment(batch, seed=self.settings.seed, epoch=epoch, settings=self.augmentation)
        predicted, truth = model(to_float(batch["image"])), make_truth(batch)
        # Matching and logarithms want float32, whatever the network ran in.
        with torch.autocast(truth.box_xyxy.device.type, enabled=False):
            if self.settings.model == "tiny":
                return tiny_loss(predicted, largest_box(truth), self.weights)
            return big_loss(predicted, truth, self.weights)

    def evaluate(self, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """Return the metrics of `DetectionTally`, but for those that do not suit the model."""
        # The loop passes its averaged copy, whose class is that of `self.model`.
        assert isinstance(model, (BigDet, TinyDet))
        class_count = len(self.facts.class_names) if self.settings.model == "big" else 1
        tally = DetectionTally(class_count, self.model.max_boxes)
        with torch.inference_mode():
            for batch in batches:
                tally.add(model.slots(model(to_float(batch["image"]))), batch)
        metrics = tally.metrics()
        # A model of many boxes is not about its first one.
        if self.settings.model == "big":
            metrics.pop("mean_iou")
        return metrics

    def describe(self) -> dict[str, object]:
        """Return what `restore_detector` needs, beside the weights."""
        return {
            **self.model.describe(),
            "facts": {
                **asdict(self.facts),
                "class_names": list(self.facts.class_names),
                "canvas": list(self.facts.canvas),
            },
        }

    def draw(self, history: Sequence[Mapping[str, float]], path: Path) -> None:
        """Draw the training curve."""
        from detector.training_curve import draw_curve

        draw_curve(history, path, title=self.name)


def restore_detector(checkpoint: Checkpoint) -> tuple[BigDet | TinyDet, DataFacts]:
    """Return the model of a checkpoint, with its averaged weights and in evaluation mode.

    Raises
    ------
    StateError
        If the checkpoint is not of a detector.
    """
    remedy = "train one with python -m scripts.train_detector"
    description = known_model(checkpoint, ("tiny", "big"), "a detector", remedy)
    try:
        facts = dict(description.pop("facts"))
        height, width = (int(side) for side in facts["canvas"])
        names = tuple(str(name) for name in facts["class_names"])
        known = DataFacts(
            int(facts["max_boxes"]),
            names,
            (height, width),
            int(facts["pad_value"]),
            str(facts["resize_mode"]),
        )
        keys = ("max_boxes", "class_count", "width")
        shape = {key: int(description[key]) for key in keys if key in description}
        # A checkpoint may come from anybody: numbers beyond these would fill the memory before the
        # weights are found not to fit.
        limits = {"max_boxes": 10_000, "class_count": 100_000, "width": 512}
        if any(not 0 <= value <= limits[key] for key, value in shape.items()):
            raise ValueError(f"model {shape}")
        if not (8 <= height <= 16_384 and 8 <= width <= 16_384):
            raise ValueError(f"canvas {height} x {width}")
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(
            "the checkpoint is not of a detector",
            where=checkpoint.path,
            found=str(error),
            remedy=remedy,
        ) from None
    model = make_model(kind=description["kind"], **shape)
    load_module(model, checkpoint.part("average"), checkpoint.path)
    return model.eval(), known
