"""python -m scripts.segment_patches --config config.yaml --segment.input_root FOLDER
[--segment.max_minutes 15]

Cuts large images into overlapping patches, trains a U-Net on those with masks, and stitches its
predictions into complete masks. Figures in segment.output show the stitched masks next to the true
masks. If the command is interrupted, run it again to resume it.
"""

import time
from pathlib import Path

from scripts._command import run
from segmentation.settings import SegmentSettings
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.log import get_log, progress
from utils.tracking.settings import ExperimentSettings

log = get_log("segment_patches")


class Settings(CommandSettings):
    segment: SegmentSettings
    loader: LoaderSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, object]:
    from ingest.pictures.large.large_pictures import LargePictures
    from segmentation.cutting import cut_patches, write_patch_manifest
    from segmentation.mask_results import peak_memory_gb, stitch_pictures
    from segmentation.prediction import predict_patches, reported_scores
    from segmentation.training import train_unet

    segment, start = settings.segment, time.monotonic()
    source = LargePictures(segment.build(), segment.patch_size)
    log.info("%s", source.found)
    patches = cut_patches(source, segment)
    manifest = write_patch_manifest(patches, segment.folder)
    log.info("patches of %s are listed in %s", patches.version, manifest)

    result: dict[str, object] = {"checkpoint": segment.checkpoint}
    if not segment.checkpoint:
        result = train_unet(segment, settings.loader, settings.experiments, patches)
    result |= {"patches": patches.version, "dice": None, "iou": None, "masks": 0}
    if not result.get("finished", True):
        log.info("training is not finished; next: run the same command again")
        return result | {"peak_memory_gb": peak_memory_gb()}

    probabilities, left = predict_patches(segment, patches, Path(str(result["checkpoint"])))
    result |= {"patch_manifest": str(manifest), "jobs_left": left}
    if probabilities is None:
        log.info("%d prediction jobs are left; next: run the same command again", left)
        return result | {"peak_memory_gb": peak_memory_gb()}

    with progress(None, "pictures", "stitching") as bar:
        done = stitch_pictures(
            patches,
            probabilities,
            segment.folder,
            blend=segment.blend,
            tolerance=segment.boundary_tolerance,
            progress=bar.advance,
        )
    log.info("%d masks; open %s in a browser", len(done.pictures), done.folder / "index.html")
    return result | {
        **reported_scores(done),
        "scores": done.scores,
        "masks": len(done.pictures),
        "path": str(done.folder),
        "peak_memory_gb": peak_memory_gb(),
        "seconds": round(time.monotonic() - start, 1),
    }


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
