"""python -m scripts.make_sample --config config.yaml [--sample.count 64]

Generates a small labelled data set from a seed or, with --sample.kind cube, a time series of
rasters, so that you can try out building and training without your own data.
"""

from ingest.synthetic.settings import SampleSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.log import get_log, progress

log = get_log("make_sample")


class Settings(CommandSettings):
    sample: SampleSettings


def main(settings: Settings) -> dict[str, object]:
    from ingest.synthetic.make import make_sample

    sample = settings.sample
    cube = sample.kind == "cube"
    noun = "dates" if cube else "pictures"
    with progress(sample.count, noun, "drawing") as bar:
        result = make_sample(sample, progress=bar.advance)
    path = result["path"]
    how = f"--config {path}/raster.yaml" if cube else f"--build.input_root {path}"
    if sample.kind in {"classes", "masks"}:
        how += f" --build.format {sample.kind}"
    log.info(
        "%d %s in %s; next: python -m scripts.build_zarr %s",
        result["count"],
        noun,
        path,
        how,
    )
    return result


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
