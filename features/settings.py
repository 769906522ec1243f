"""The `features`, `head` and `finetune` sections: cached features, heads on them, fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from utils.training.settings import TrainSettings
from warehouse.errors import ConfigError
from warehouse.settings import Section

__all__ = [
    "SHIPPED",
    "FeatureSettings",
    "FinetuneSettings",
    "FinetuneTraining",
    "HeadSettings",
    "PictureTraining",
]


class FeatureSettings(Section):
    """What `extract_features` encodes, with what, in how many jobs."""

    warehouse: str | None = Field(
        None,
        description="a warehouse of pictures or one of its versions; null: the newest under build.output_root",
    )
    encoder: str = Field(
        "efficientnet_b0",
        description="a hub name, a folder, random:efficientnet_b0, or a checkpoint of ours",
    )
    size: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="side pictures are resized to; null: what suits the encoder",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of random weights")
    offline: bool = Field(False, description="never ask the hub")
    feature_map: bool = Field(False, description="keep the spatial map too")
    picture_label: Literal["largest", "commonest"] = Field(
        "largest", description="which box names its picture, where classes are of boxes"
    )
    job_size: int = Field(
        64, ge=1, le=65_536, description="samples of a job, which is one stored chunk"
    )
    jobs: int | None = Field(None, ge=1, description="do at most so many jobs now; null: all")
    batch_size: int = Field(8, ge=1, le=4096)
    output_root: str = Field(
        "artifacts/features", description="where versions of features are published"
    )
    work: str = Field(
        "artifacts/feature_jobs", description="queues and exports, a folder a version"
    )
    export_npz: bool = Field(False, description="also a float16 .npz a picture")


SHIPPED: list[dict[str, Any]] = [
    {"name": "linear", "kind": "linear"},
    {"name": "mlp", "kind": "mlp"},
    {"name": "mlp_mixup", "kind": "mlp", "mixup": 0.2, "noise": 0.1, "label_smoothing": 0.1},
]


class HeadSettings(Section):
    """What `train_head` trains on a version of features.

    `ablations` are run one after another, each with its overrides.
    """

    features: str | None = Field(
        None,
        description="a version of features or its root; null: the newest under features.output_root",
    )
    checkpoint: str | None = Field(None, description="score this trained head instead of training")
    other_pictures: bool = Field(False, description="score it also on features of another store")
    name: str = Field("head", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    kind: Literal["linear", "mlp", "attention"] = "linear"
    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=1)
    accumulate: int = Field(1, ge=1, description="batches an optimizer step")
    lr: float = Field(0.01, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    hidden: int = Field(256, ge=1, le=65_536, description="of mlp and attention")
    dropout: float = Field(0.1, ge=0, lt=1)
    noise: float = Field(0.0, ge=0, description="Gaussian, in standard deviations of each feature")
    mixup: float = Field(
        0.0, ge=0, description="alpha of the Beta distribution (arXiv:1710.09412); 0: none"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: bool = Field(False, description="weigh each class by the inverse of its count")
    patience: int | None = Field(
        None, ge=1, description="stop after so many epochs without a better accuracy; null: never"
    )
    ablations: list[dict[str, Any]] = Field(
        SHIPPED, description="overrides of these settings, a run each; []: one run as it stands"
    )
    seed: int = Field(0, ge=0, lt=2**63)
    output: str = "experiments"


class PictureTraining(TrainSettings):
    """Augmentation beside a trainer's own settings.

    Flips are probabilities, the others the largest change, 0 for none.
    """

    flip_x: float = Field(0.5, ge=0, le=1)
    flip_y: float = Field(0.0, ge=0, le=1)
    zoom: float = Field(0.15, ge=0, lt=1, description="scales by 1/1.15 to 1.15")
    shift: float = Field(0.08, ge=0, lt=1, description="share of the side")
    rotate: float = Field(8.0, ge=0, le=180, description="degrees")
    contrast: float = Field(0.2, ge=0, lt=1)
    brightness: float = Field(0.2, ge=0, lt=1)


class FinetuneTraining(PictureTraining):
    """What decides the weights: a resumed run must have these alike."""

    epochs: int | None = Field(10, ge=1, description="those of the head alone included")
    batch_size: int = Field(4, ge=1, le=65_536, description="samples that go through at a time")
    accumulate: int = Field(4, ge=1, description="batches an optimizer step")
    warmup_steps: int = Field(
        20, ge=0, description="of the head, and again of the blocks when they join in"
    )
    average: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="decay of the running average of the weights, which is what is kept; 0: none",
    )
    blocks: int | None = Field(
        4,
        ge=1,
        description="the last so many of the encoder's are trained; null: the whole encoder",
    )
    head_epochs: int = Field(2, ge=0, description="epochs in which only the head learns")
    backbone_rate: float = Field(
        0.1, gt=0, le=10, description="learning rate of the last block, as a share of the head's"
    )
    block_decay: float = Field(
        0.8, gt=0, le=1, description="rate of each earlier block, as a share of the next one's"
    )
    norms: Literal["frozen", "trained"] | None = Field(
        None, description="statistics of trained blocks' batch norms; null: by the encoder"
    )
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    picture_label: Literal["largest", "commonest"] = Field(
        "largest", description="which box names its picture, where classes are of boxes"
    )


class FinetuneSettings(FinetuneTraining):
    """What `finetune` trains, from which weights, within which limits."""

    warehouse: str | None = Field(
        None,
        description="a warehouse of pictures or one of its versions; null: the newest under build.output_root",
    )
    encoder: str = Field(
        "efficientnet_b0",
        description="a hub name, a folder, random:efficientnet_b0, or a checkpoint of ours",
    )
    size: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="side pictures are resized to; null: what suits the encoder",
    )
    offline: bool = Field(False, description="never ask the hub")
    memory_budget_gb: float | None = Field(
        4.0, gt=0, description="of the GPU, or of this process; null: no limit"
    )
    recompute: bool = Field(
        False,
        description="trained blocks forget their activations and compute them again: less memory, more time",
    )
    save_steps: int = Field(100, ge=1, description="steps between checkpoints")
    output: str | None = Field(
        "checkpoints/finetune",
        description="the encoder; below it, training/ has what a later session goes on from",
    )
    resume: bool = Field(True, description="go on from the checkpoint in output/training")

    @model_validator(mode="after")
    def _something_is_tuned(self) -> FinetuneSettings:
        if self.epochs is not None and self.head_epochs >= self.epochs:
            raise ValueError(
                f"head_epochs {self.head_epochs} must be fewer than epochs {self.epochs}"
            )
        if self.recompute and self.norms == "trained":
            raise ValueError(
                "recompute would count every batch twice in the statistics of trained norms: take norms frozen"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output or "checkpoints/finetune")

    def require_other_encoder(self) -> None:
        """Raises ConfigError for an encoder that lies where the fine-tuned one is written.

        It would be overwritten by its own successor.
        """
        path = Path(self.encoder).expanduser()
        source = (path.parent if path.name == "checkpoint.json" else path).resolve()
        if source in {self.folder.resolve(), (self.folder / "training").resolve()}:
            raise ConfigError(
                "the encoder would be overwritten by what is made of it",
                where="finetune.output",
                found=self.folder,
                remedy="choose another --finetune.output",
            )

    def training(self) -> FinetuneTraining:
        """The part that decides the weights, with its state below `folder`."""
        kept = {key: getattr(self, key) for key in FinetuneTraining.model_fields}
        return FinetuneTraining(**kept | {"output": str(self.folder / "training")})
