"""The `vqvae` and `compress` sections: the model and its training, and how a cube is compressed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from utils.training.settings import TrainSettings
from warehouse.settings import Section

__all__ = ["CompressSettings", "Size", "VqvaeSettings"]


Size = tuple[int, int, int]


class VqvaeSettings(TrainSettings):
    """What `train_vqvae` trains, on what, for how long. Triples are (time, y, x) in voxels."""

    warehouse: str | None = Field(
        None,
        description="a warehouse or one of its versions; null: the newest under build.output_root",
    )
    clip_norm: float = Field(1.0, gt=0)
    quantizer: Literal["ema", "fsq"] = "ema"
    codebook_size: int = Field(512, ge=4, le=65_536)
    code_dim: int = Field(
        64,
        ge=1,
        le=1024,
        description="numbers a latent vector; fsq takes its own from codebook_size",
    )
    levels: int = Field(8, ge=1, le=32, description="residual levels")
    level_dropout: float = Field(
        0.3,
        ge=0,
        le=1,
        description="share of samples decoded from an even draw of 1..levels levels",
    )
    beta: float = Field(0.8, ge=0, description="weight of the commitment to the codes")
    cat_weight: float = Field(0.1, ge=0)
    canopy_weight: float = Field(0.2, ge=0)
    huber: float | None = Field(
        None,
        gt=0,
        description="scaled error (channels.py) from where the squared error is linear; null: never",
    )
    stride: Size = Field((5, 4, 4), description="voxels a latent position")
    patch: Size = Field(
        (5, 4, 4), description="voxels the stem folds into channels; a divisor of stride"
    )
    width: int = Field(128, ge=8, le=4096, multiple_of=8)
    depth: int = Field(4, ge=0, le=64, description="residual blocks on each side")
    decay: float = Field(0.99, gt=0, lt=1, description="of the codebook's averages")
    dead_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="a code whose average count is under this share of the mean is replaced",
    )
    collapse_share: float = Field(
        0.1, ge=0, lt=1, description="perplexity under this share of what is possible is a collapse"
    )
    collapse_steps: int = Field(20, ge=1)
    start_step: int = Field(5, ge=0, description="steps before the k-means start of the codebooks")
    window: Size | None = Field(
        None, description="part of an inner chunk that is a sample; null: all of it"
    )
    min_valid_share: float = Field(
        0.1, ge=0, le=1, description="inner chunks with fewer valid voxels are left out"
    )
    sampling: Literal["chunk", "random"] = "chunk"
    flips: bool = True


class CompressSettings(Section):
    """What `compress_zarr` makes of a cube and a trained VQ-VAE."""

    warehouse: str | None = Field(
        None,
        description="a cube's warehouse or one of its versions; null: the newest under build.output_root",
    )
    checkpoint: str = Field(
        "checkpoints/vqvae", description="of the model: its folder or checkpoint.json"
    )
    output_root: str = Field("artifacts/codes", description="where versions of codes are published")
    levels: int | None = Field(
        None, ge=1, le=32, description="residual levels kept; null: all the model has"
    )
    rate_weight: float = Field(
        0.2,
        ge=0,
        le=1000,
        description="thousandths of the latent variance a bit is worth; 0: nearest codes",
    )
    paths: int = Field(4, ge=1, le=64, description="sequences of codes kept a level while choosing")
    shard_samples: int = Field(
        256,
        ge=1,
        le=65_536,
        description="samples of a stored chunk of codes, the unit that decodes alone",
    )
    reconstruct: str | None = Field(
        None, description="folder where the reconstruction is published as a cube; null: none"
    )
    report: str | None = Field(
        None, description="folder of the rate-distortion report on held-out blocks; null: none"
    )
    report_samples: int = Field(
        2048, ge=1, description="held-out blocks the report looks at, at most"
    )
    workers: int = Field(
        0, ge=0, le=256, description="processes; 0: this one, with all of PyTorch's threads"
    )
    if_exists: Literal["skip", "clear"] = "skip"
    device: str = Field("cpu", description="cpu, auto, cuda, cuda:1, ...")
