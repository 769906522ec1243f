"""python -m scripts.infer_view --infer.checkpoint checkpoints/bigdet --infer.input PATH

Draws the boxes that a detector finds in an image, a folder of images or a warehouse. It writes a
PNG file for each image, and a page, index.html, with all of them, on which you can change the score
threshold. For a warehouse, the true boxes are drawn too.
"""

from pathlib import Path

from detector.settings import InferSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.log import get_log, progress
from warehouse.settings import BuildSettings

log = get_log("infer_view")


class Settings(CommandSettings):
    infer: InferSettings
    loader: LoaderSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, object]:
    from detector.inference.image_batches import (
        count_boxes,
        decoded_batches,
        is_warehouse,
        warehouse_batches,
    )
    from detector.inference.overlay import DetectedImage
    from detector.inference.page import write_view
    from detector.inference.predictor import Predictor
    from detector.task import restore_detector
    from ingest.pictures.show import Canvas, read_pictures
    from utils.training.checkpoint import load_checkpoint
    from utils.training.ranks import choose_device

    infer = settings.infer
    model, facts = restore_detector(load_checkpoint(Path(infer.checkpoint)))
    predictor = Predictor(model, facts, choose_device(infer.device))
    source = Path(infer.input or settings.build.output_root)
    if is_warehouse(source):
        batches = warehouse_batches(source, infer, settings.loader)
    else:
        canvas = Canvas(facts.canvas, facts.pad_value, facts.resize_mode)
        decoded = read_pictures(
            source,
            canvas,
            limit=infer.limit,
            batch_size=infer.batch_size,
            max_pixels=settings.build.max_pixels,
        )
        batches = decoded_batches(decoded)

    detected: list[DetectedImage] = []
    with progress(None, "pictures", "detecting") as bar:
        for batch, names, pictures in batches:
            detected += predictor.predict(batch, names, pictures)
            bar.advance(len(names))
    boxes = count_boxes(detected, infer.threshold)
    title = f"{source.name or source}: {len(detected)} pictures"
    page = write_view(detected, facts.class_names, infer.threshold, Path(infer.output), title)
    log.info("open %s in a browser", page)
    return {"pictures": len(detected), "boxes": boxes, "path": str(page)}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
