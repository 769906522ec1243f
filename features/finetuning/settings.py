"""The `finetune` section: training an encoder with a head on top, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from utils.training.settings import TrainSettings
from warehouse.errors import ConfigError

__all__ = ["FinetuneSettings", "FinetuneTraining"]


class FinetuneTraining(TrainSettings):
    """What decides the weights: a resumed run must have the same values.

    Of the augmentation, flips are probabilities; the others are the largest change, 0 for none.
    """

    flip_x: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    flip_y: float = Field(0.0, ge=0, le=1, description="Probability of a vertical flip.")
    zoom: float = Field(
        0.15,
        ge=0,
        lt=1,
        description="Largest relative change of scale: 0.15 scales by 1/1.15 to 1.15.",
    )
    shift: float = Field(0.08, ge=0, lt=1, description="Largest shift as a share of the side.")
    rotate: float = Field(8.0, ge=0, le=180, description="Largest rotation in degrees.")
    contrast: float = Field(0.2, ge=0, lt=1, description="Largest relative change of contrast.")
    brightness: float = Field(0.2, ge=0, lt=1, description="Largest relative change of brightness.")
    epochs: int | None = Field(
        10,
        ge=1,
        description=(
            "Number of epochs, including head_epochs; null means that max_minutes alone ends"
            " training."
        ),
    )
    batch_size: int = Field(
        4, ge=1, le=65_536, description="Samples that pass through the network at a time."
    )
    accumulate: int = Field(4, ge=1, description="Number of batches per optimizer step.")
    warmup_steps: int = Field(
        20,
        ge=0,
        description=(
            "Number of steps over which the learning rate rises, at the start and again"
            " after head_epochs."
        ),
    )
    average: float = Field(
        0.99,
        ge=0,
        lt=1,
        description=(
            "Decay of the moving average of the weights, which is saved in their place; 0"
            " means no average."
        ),
    )
    blocks: int | None = Field(
        4,
        ge=1,
        description=(
            "Number of blocks to train, counted from the end of the encoder; null trains the"
            " whole encoder."
        ),
    )
    head_epochs: int = Field(
        2, ge=0, description="Number of epochs at the start in which only the head is trained."
    )
    backbone_rate: float = Field(
        0.1,
        gt=0,
        le=10,
        description="Learning rate of the last block as a share of the head's.",
    )
    block_decay: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Learning rate of each earlier block as a share of the next block's.",
    )
    norms: Literal["frozen", "trained"] | None = Field(
        None,
        description=(
            "Batch-norm statistics of trained blocks: frozen or trained; null trains them"
            " for a random encoder."
        ),
    )
    label_smoothing: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the target probability that is spread over all classes.",
    )
    picture_label: Literal["largest", "commonest"] = Field(
        "largest",
        description=(
            "How the class of an image with boxes is chosen: largest (class of the largest box) "
            "or commonest (most common class)."
        ),
    )


class FinetuneSettings(FinetuneTraining):
    """What `finetune` trains, from which weights, within which limits."""

    warehouse: str | None = Field(
        None,
        description=(
            "Warehouse of images, or one of its versions; null means the newest under "
            "build.output_root."
        ),
    )
    encoder: str = Field(
        "efficientnet_b0",
        description=(
            "Encoder: a name on the model hub, a folder, random:efficientnet_b0, or a "
            "checkpoint folder of this project."
        ),
    )
    size: int | None = Field(
        None,
        ge=16,
        le=4096,
        description=(
            "Side in pixels to which images are resized; null means the encoder's own size."
        ),
    )
    offline: bool = Field(
        False,
        description="Never access the model hub; use only models that are stored on this machine.",
    )
    memory_budget_gb: float | None = Field(
        4.0,
        gt=0,
        description=(
            "Gigabytes that may be used on the GPU or, without one, by this process; null"
            " means no limit."
        ),
    )
    recompute: bool = Field(
        False,
        description=(
            "Save memory by computing the activations of trained blocks again in the backward pass."
        ),
    )
    save_steps: int = Field(100, ge=1, description="Number of steps between checkpoints.")
    output: str | None = Field(
        "checkpoints/finetune",
        description=(
            "Folder for the fine-tuned encoder; its subfolder training holds the checkpoint"
            " to resume from."
        ),
    )
    resume: bool = Field(True, description="Resume from the checkpoint in output/training.")

    @model_validator(mode="after")
    def _something_is_tuned(self) -> FinetuneSettings:
        if self.epochs is not None and self.head_epochs >= self.epochs:
            raise ValueError(
                f"head_epochs {self.head_epochs} must be fewer than epochs {self.epochs}"
            )
        if self.recompute and self.norms == "trained":
            raise ValueError(
                "recompute would count every batch twice in the statistics of trained norms:"
                " set norms to frozen"
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
