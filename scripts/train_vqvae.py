"""python -m scripts.train_vqvae --config config.yaml [--vqvae.quantizer fsq --vqvae.max_minutes 15]

Trains a vector-quantised autoencoder on a cube and evaluates the model on the held-out blocks after
each epoch. The checkpoint, log.jsonl, curve.png and sheet.png are written to vqvae.output. To train
in several processes, run: torchrun --nproc-per-node 2 -m scripts.train_vqvae ...
"""

from scripts._command import run
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.tracking.settings import ExperimentSettings
from vqvae.settings import VqvaeSettings
from warehouse.settings import BuildSettings


class Settings(CommandSettings):
    vqvae: VqvaeSettings
    loader: LoaderSettings
    build: BuildSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, object]:
    from utils.training.ranks import Ranks
    from vqvae.training import train_vqvae

    vqvae = settings.vqvae
    ranks = Ranks.start(vqvae.device)
    try:
        return train_vqvae(
            vqvae,
            settings.loader,
            settings.experiments,
            vqvae.warehouse or settings.build.output_root,
            ranks,
        )
    finally:
        ranks.close()


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
