"""The `features` and `head` sections: cached features, and heads on them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from warehouse.section import NOT_CONTENT, RECORDED_APART, Section

__all__ = [
    "SHIPPED",
    "FeatureSettings",
    "HeadSettings",
]


class FeatureSettings(Section):
    """What `extract_features` encodes, with what, in how many jobs."""

    warehouse: Annotated[str | None, RECORDED_APART] = Field(
        None,
        description=(
            "Warehouse of images, or one of its versions; null means the newest under "
            "build.output_root."
        ),
    )
    encoder: Annotated[str, RECORDED_APART] = Field(
        "efficientnet_b0",
        description=(
            "Encoder: a name on the model hub, a folder, random:efficientnet_b0, or a "
            "checkpoint folder of this project."
        ),
    )
    size: Annotated[int | None, RECORDED_APART] = Field(
        None,
        ge=16,
        le=4096,
        description=(
            "Side in pixels to which images are resized; null means the encoder's own size."
        ),
    )
    seed: Annotated[int, RECORDED_APART] = Field(
        0, ge=0, lt=2**63, description="Seed for the weights of a random encoder."
    )
    offline: Annotated[bool, NOT_CONTENT] = Field(
        False,
        description="Never access the model hub; use only models that are stored on this machine.",
    )
    feature_map: bool = Field(
        False, description="Also store the spatial feature map, which attention heads need."
    )
    picture_label: Annotated[Literal["largest", "commonest"], RECORDED_APART] = Field(
        "largest",
        description=(
            "How the class of an image with boxes is chosen: largest (class of the largest box) "
            "or commonest (most common class)."
        ),
    )
    job_size: int = Field(
        64, ge=1, le=65_536, description="Samples per job; a job is one stored chunk."
    )
    jobs: Annotated[int | None, NOT_CONTENT] = Field(
        None, ge=1, description="Largest number of jobs to run now; null means all."
    )
    batch_size: int = Field(8, ge=1, le=4096, description="Images per batch of the encoder.")
    output_root: Annotated[str, NOT_CONTENT] = Field(
        "artifacts/features", description="Warehouse in which the version of features is published."
    )
    work: Annotated[str, NOT_CONTENT] = Field(
        "artifacts/feature_jobs",
        description="Folder for job queues and exports, with a folder per version.",
    )
    export_npz: Annotated[bool, NOT_CONTENT] = Field(
        False, description="Also write a float16 .npz file per image."
    )


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
        description=(
            "Warehouse of features, or one of its versions; null means the newest under "
            "features.output_root."
        ),
    )
    checkpoint: str | None = Field(
        None, description="Trained head to evaluate instead of training; null trains heads."
    )
    other_pictures: bool = Field(
        False, description="Allow checkpoint to be evaluated on features of another warehouse."
    )
    name: str = Field(
        "head",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Name of the run in the experiment log.",
    )
    kind: Literal["linear", "mlp", "attention"] = Field(
        "linear",
        description="Kind of head: linear, mlp or attention; attention needs features.feature_map.",
    )
    epochs: int = Field(10, ge=1, description="Number of epochs.")
    batch_size: int = Field(128, ge=1, description="Samples per batch.")
    accumulate: int = Field(1, ge=1, description="Number of batches per optimizer step.")
    lr: float = Field(0.01, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    hidden: int = Field(
        256, ge=1, le=65_536, description="Hidden units of an mlp or attention head."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="Probability of dropout in the head.")
    noise: float = Field(
        0.0,
        ge=0,
        description=(
            "Standard deviation of the added Gaussian noise, in units of each feature's"
            " standard deviation."
        ),
    )
    mixup: float = Field(
        0.0,
        ge=0,
        description=(
            "Alpha of the Beta distribution of mixup (arXiv:1710.09412); 0 turns mixup off."
        ),
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the target probability that is spread over all classes.",
    )
    class_weights: bool = Field(False, description="Weight each class by the inverse of its count.")
    patience: int | None = Field(
        None,
        ge=1,
        description=(
            "Number of epochs without an improvement in accuracy after which training stops; "
            "null means never."
        ),
    )
    ablations: list[dict[str, Any]] = Field(
        SHIPPED,
        description=(
            "Runs to train one after another, each with its own values of these keys; [] "
            "means one run."
        ),
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed for the weights, the sample order and the augmentation.",
    )
    output: str = Field(
        "experiments",
        description="Folder for checkpoints and figures of runs that are not in an experiment log.",
    )
