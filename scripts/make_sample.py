"""python -m scripts.make_sample --config config.yaml [--sample.count 64]

Draws a small labelled set, or with --sample.kind cube a series of rasters, from a seed: a build and
a training without any data.
"""

from typing import Any

from ingest.synthetic.make import make_sample
from ingest.synthetic.settings import SampleSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log, progress

log = get_log(__name__)


class Settings(CommandSettings):
    sample: SampleSettings


def main(settings: Settings) -> dict[str, Any]:
    sample = settings.sample
    cube = sample.kind == "cube"
    noun = "dates" if cube else "pictures"
    with progress(sample.count, noun, "drawing") as bar:
        result = make_sample(sample, progress=bar.advance)
    how = (
        f"--config {result['path']}/raster.yaml" if cube else f"--build.input_root {result['path']}"
    )
    if sample.kind in {"classes", "masks"}:
        how += f" --build.format {sample.kind}"
    log.info(
        "%d %s in %s; next: python -m scripts.build_zarr %s",
        result["count"],
        noun,
        result["path"],
        how,
    )
    return result


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
