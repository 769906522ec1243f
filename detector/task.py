"""The detectors as a Task of the training loop: settings, model, loss with augmentation,
evaluation, checkpoint description.

Everything a detector needs to know about its data is in `DataFacts`, read from the store: slots,
classes, canvas. Augmentation runs on the batch on its device, from (seed, epoch, sample index), so
workers and engines have no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

__all__ = ["DataFacts", "DetectorTask", "data_facts", "restore_detector"]


@dataclass(frozen=True, slots=True)
class DataFacts:
    """max_boxes: the store's slots; class_names; canvas (H, W) in pixels.

    pad_value and resize_mode of the letterbox.
    """

    max_boxes: int
    class_names: tuple[str, ...]
    canvas: tuple[int, int]
    pad_value: int = 114
    resize_mode: str = "letterbox"


def data_facts(split: Any, settings: DetectorSettings) -> DataFacts:
    """From a warehouse split.

    Raises TrainingError when it has no boxes, or other slots than `detector.max_boxes`.
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
    """TinyDet or BigDet with its loss and metrics; see utils.training.task.Task."""

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
        strength = (
            settings.strength if settings.strength is not None else float(settings.model == "big")
        )
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
        if self.settings.model == "tiny":
            # Before augmentation, which then has a quarter of the pixels to move.
            batch = {**batch, "image": reduced((to_float(batch["image"]) + 1) / 2)}
        batch = augment(batch, seed=self.settings.seed, epoch=epoch, settings=self.augmentation)
        said, truth = model(to_float(batch["image"])), make_truth(batch)
        # Matching and logarithms want float32, whatever the network ran in.
        with torch.autocast(truth.box_xyxy.device.type, enabled=False):
            if self.settings.model == "tiny":
                return tiny_loss(said, largest_box(truth), self.weights)
            return big_loss(said, truth, self.weights)

    def evaluate(self, model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        # The loop passes its averaged copy, whose class is that of `self.model`.
        assert isinstance(model, (BigDet, TinyDet))
        class_count = len(self.facts.class_names) if self.settings.model == "big" else 1
        tally = DetectionTally(class_count, self.model.max_boxes)
        with torch.inference_mode():
            for batch in batches:
                tally.add(model.slots(model(to_float(batch["image"]))), batch)
        metrics = tally.metrics()
        if self.settings.model == "big":
            metrics.pop("mean_iou")
        return metrics

    def describe(self) -> dict[str, Any]:
        return {
            **self.model.describe(),
            "facts": {
                **asdict(self.facts),
                "class_names": list(self.facts.class_names),
                "canvas": list(self.facts.canvas),
            },
        }

    def draw(self, history: list[dict[str, Any]], path: Path) -> None:
        from detector.training_curve import draw_curve

        draw_curve(history, path, title=self.name)


def restore_detector(checkpoint: Checkpoint) -> tuple[BigDet | TinyDet, DataFacts]:
    """The model of a checkpoint, with its averaged weights, in eval mode.

    Raises StateError when it is not a detector of ours.
    """
    remedy = "train one with python -m scripts.train_detector"
    said = known_model(checkpoint, ("tiny", "big"), "a detector", remedy)
    try:
        facts = dict(said.pop("facts"))
        height, width = (int(side) for side in facts["canvas"])
        names = tuple(str(name) for name in facts["class_names"])
        known = DataFacts(
            int(facts["max_boxes"]),
            names,
            (height, width),
            int(facts["pad_value"]),
            str(facts["resize_mode"]),
        )
        shape = {
            key: int(said[key]) for key in ("max_boxes", "class_count", "width") if key in said
        }
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
    model = make_model(kind=said["kind"], **shape)
    load_module(model, checkpoint.part("average"), checkpoint.path)
    return model.eval(), known
