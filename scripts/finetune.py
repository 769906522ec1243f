"""python -m scripts.finetune --config config.yaml --finetune.encoder random:efficientnet_b0
[--finetune.blocks 4 --finetune.max_minutes 10]

Trains the last blocks of an encoder and a head on a warehouse of images with classes, within a
memory budget. If the command is interrupted or stops after max_minutes, run it again to resume it.
The result in finetune.output is an encoder for extract_features.
"""

from functools import partial

from features.finetuning.settings import FinetuneSettings
from scripts._backbones import our_backbones
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.loading.settings import LoaderSettings
from utils.tracking.settings import ExperimentSettings
from warehouse.settings import BuildSettings


class Settings(CommandSettings):
    finetune: FinetuneSettings
    loader: LoaderSettings
    build: BuildSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, object]:
    from features.encoders.open_encoder import open_encoder
    from features.finetuning.run_finetuning import finetune

    chosen = settings.finetune
    return finetune(
        chosen,
        settings.loader,
        settings.experiments,
        chosen.warehouse or settings.build.output_root,
        partial(
            open_encoder,
            chosen.encoder,
            size=chosen.size,
            seed=chosen.seed,
            offline=chosen.offline,
            backbones=our_backbones(),
        ),
    )


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
