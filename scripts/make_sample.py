"""python -m scripts.make_sample --config config.yaml [--sample.count 64]

Draws a small labelled set from a seed, so that a build and a training can be tried without any data.
"""

from typing import Any

from ingest.synthetic import make_sample
from utils.argyaml import run
from utils.log import get_log, progress

log = get_log(__name__)


def main(settings: Any) -> dict[str, Any]:
    sample = settings.sample
    with progress(sample.count, "pictures", "drawing") as bar:
        result = make_sample(sample, progress=bar.advance)
    log.info("%d pictures in %s; next: python -m scripts.build_zarr --build.input_root %s", result["count"], result["path"], result["path"])
    return result


if __name__ == "__main__":
    raise SystemExit(run(main, __doc__, sample="ingest.synthetic:SampleSettings"))
