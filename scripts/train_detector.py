"""python -m scripts.train_detector --config config.yaml [--detector.model big --detector.epochs 20]

Trains TinyDet or BigDet on a warehouse and evaluates the model on the held-out split after each
epoch. The checkpoint, log.jsonl and curve.png are written to detector.output. To train in several
processes, run: torchrun --nproc-per-node 2 -m scripts.train_detector ...
"""

from detector.settings import DetectorSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.tracking.settings import ExperimentSettings
from warehouse.settings import BuildSettings


class Settings(CommandSettings):
    detector: DetectorSettings
    loader: LoaderSettings
    build: BuildSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, object]:
    from detector.training import train_detector
    from utils.training.ranks import Ranks

    detector = settings.detector
    ranks = Ranks.start(detector.device)
    try:
        return train_detector(
            detector,
            settings.loader,
            settings.experiments,
            detector.warehouse or settings.build.output_root,
            ranks,
        )
    finally:
        ranks.close()


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
