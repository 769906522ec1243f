"""python -m scripts.infer_view --infer.checkpoint checkpoints/bigdet --infer.input PICTURE, FOLDER
or WAREHOUSE

Draws what a detector finds: a PNG a picture, and index.html with all of them and a score slider.
From a warehouse, the truth too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def main(settings: Settings) -> dict[str, Any]:
    from detector.predict import Predictor
    from detector.task import restore_detector
    from detector.view import write_view
    from utils.training.checkpoint import load_checkpoint
    from utils.training.ranks import choose_device

    infer = settings.infer
    checkpoint = load_checkpoint(Path(infer.checkpoint))
    model, facts = restore_detector(checkpoint)
    predictor = Predictor(model, facts, choose_device(infer.device))
    source = Path(infer.input or settings.build.output_root)
    shown = []
    with progress(None, "pictures", "looking") as bar:
        batches = (
            from_warehouse(source, settings)
            if is_warehouse(source)
            else from_files(source, facts, settings)
        )
        for batch, names, pictures in batches:
            shown += predictor.look(batch, names, pictures)
            bar.advance(len(names))
    boxes = sum(int((one.score >= infer.threshold).sum()) for one in shown)
    if not boxes:
        best = max((float(one.score.max()) for one in shown if len(one.score)), default=0.0)
        log.warning(
            "no box scores %g or more, the best %.3f: lower --infer.threshold, or train longer",
            infer.threshold,
            best,
        )
    page = write_view(
        shown,
        facts.class_names,
        infer.threshold,
        Path(infer.output),
        f"{source.name or source}: {len(shown)} pictures",
    )
    log.info("open %s in a browser", page)
    return {"pictures": len(shown), "boxes": boxes, "path": str(page)}


def is_warehouse(source: Path) -> bool:
    return source.name == "manifest.json" or any(
        (source / name).is_file() for name in ("CURRENT", "manifest.json")
    )


def from_warehouse(
    source: Path, settings: Settings
) -> Iterator[tuple[dict[str, Any], list[str], None]]:
    """Loader batches of the split, in its order, with the names of their sources."""
    from utils.loader import ChunkLoader
    from warehouse import Warehouse

    warehouse = Warehouse.open(source)
    split = warehouse.split(settings.infer.split)
    rows = warehouse.table("samples.parquet", ["split", "index", "source"]).to_pylist()
    names = {row["index"]: row["source"] for row in rows if row["split"] == split.name}
    left = settings.infer.limit
    if len(split) > left:
        log.warning(
            "showing the first %d of %d pictures; --infer.limit shows more", left, len(split)
        )
    batch_size = min(settings.infer.batch_size, max(split.chunk_sizes))
    with ChunkLoader(split, batch_size, shuffle=False, **settings.loader.model_dump()) as loader:
        for whole in loader:
            batch = {key: value[:left] for key, value in whole.items()}
            yield batch, [names[int(at)] for at in batch["index"]], None
            left -= len(batch["index"])
            if left <= 0:
                return


def from_files(
    source: Path, facts: Any, settings: Settings
) -> Iterator[tuple[dict[str, Any], list[str], list[Any]]]:
    """Pictures decoded and letterboxed as the build would, with the decoded pictures themselves to
    draw on.
    """
    import numpy as np
    import torch

    from ingest.pictures.images import MAX_FILE_BYTES, decode_rgb, letterbox_into, plan_letterbox
    from ingest.sources import read_inside
    from warehouse.errors import SourceError

    root, paths = picture_paths(source, settings.infer.limit)
    for start in range(0, len(paths), settings.infer.batch_size):
        names, pictures, canvases, geometries = [], [], [], []
        for path in paths[start : start + settings.infer.batch_size]:
            try:
                picture, _ = decode_rgb(
                    read_inside(root, path, limit=MAX_FILE_BYTES),
                    name=path,
                    max_pixels=settings.build.max_pixels,
                )
            except SourceError as error:
                if len(paths) == 1:
                    raise
                log.warning("left out: %s", error)
                continue
            geometry = plan_letterbox(
                picture.shape[1], picture.shape[0], facts.canvas, facts.resize_mode
            )
            canvas = np.empty((3, *facts.canvas), np.uint8)
            letterbox_into(picture, geometry, canvas, facts.pad_value)
            names, pictures = [*names, path], [*pictures, picture]
            canvases, geometries = [*canvases, canvas], [*geometries, geometry.row()]
        if names:
            yield (
                {
                    "image": torch.from_numpy(np.stack(canvases)),
                    "letterbox": torch.from_numpy(np.stack(geometries)),
                },
                names,
                pictures,
            )


def picture_paths(source: Path, limit: int) -> tuple[Path, list[str]]:
    """The root and the relative paths of the picture, or of the pictures below the folder."""
    from ingest.sources import PICTURE_EXTENSIONS
    from warehouse.errors import SourceError

    if source.is_file():
        return source.parent, [source.name]
    if not source.is_dir():
        raise SourceError(
            "no such picture, folder or warehouse",
            where=source,
            remedy="name one with --infer.input",
        )
    found = sorted(
        path
        for path in source.rglob("*")
        if path.suffix.lower() in PICTURE_EXTENSIONS and path.is_file()
    )
    if not found:
        raise SourceError(
            "no pictures found",
            where=source,
            remedy="name a picture, a folder of pictures or a warehouse with --infer.input",
        )
    if len(found) > limit:
        log.warning(
            "showing the first %d of %d pictures; --infer.limit shows more", limit, len(found)
        )
    return source, [path.relative_to(source).as_posix() for path in found[:limit]]


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
