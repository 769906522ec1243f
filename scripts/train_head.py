"""python -m scripts.train_head --config config.yaml [--head.features FOLDER --head.epochs 50]

Trains heads on a published version of features, one after another as listed in head.ablations, and
compares them on the held-out split. The checkpoint and confusion matrix of each run are written
below head.output, and its metrics are recorded in the experiment log. With --head.checkpoint, a
trained head is scored instead.
"""

from pathlib import Path

from features.settings import FeatureSettings, HeadSettings
from scripts._command import run
from utils.argyaml import CommandSettings
from utils.tracking.settings import ExperimentSettings


class Settings(CommandSettings):
    head: HeadSettings
    features: FeatureSettings
    experiments: ExperimentSettings


def main(settings: Settings) -> dict[str, object]:
    from features.heads.run_heads import score_trained_head, train_heads
    from warehouse import Warehouse

    head = settings.head
    warehouse = Warehouse.open(head.features or settings.features.output_root)
    if head.checkpoint:
        return score_trained_head(warehouse, head, Path(head.checkpoint))
    return train_heads(warehouse, head, settings.experiments)


if __name__ == "__main__":
    raise SystemExit(run(main, Settings, __doc__))
