"""python -m scripts.extract_features --config config.yaml --features.encoder random:efficientnet_b0
[--features.jobs 3]

Encodes the images of a warehouse into a published version of features, in small jobs that several
processes can share. If the command is interrupted, run it again to continue with the remaining
jobs. When no jobs are left, the version is checked and published below features.output_root.
"""

import time

from features.settings import FeatureSettings
from scripts._backbones import our_backbones
from scripts._command import run
from utils.argyaml import CommandSettings
from warehouse.settings import BuildSettings


class Settings(CommandSettings):
    features: FeatureSettings
    build: BuildSettings


def main(settings: Settings) -> dict[str, object]:
    from features.encoders.open_encoder import open_encoder
    from features.run_extraction import extract_features
    from warehouse import Warehouse

    features, start = settings.features, time.monotonic()
    source = Warehouse.open(features.warehouse or settings.build.output_root)
    encoder = open_encoder(
        features.encoder,
        size=features.size,
        seed=features.seed,
        offline=features.offline,
        backbones=our_backbones(),
    )
    result = extract_features(source, encoder, features)
    return result | {"seconds": round(time.monotonic() - start, 3)}


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
