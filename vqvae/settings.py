"""The `vqvae` and `compress` sections: the model and its training, and how a cube is compressed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from utils.training.settings import TrainSettings
from warehouse.section import NOT_CONTENT, RECORDED_APART, Section

__all__ = ["CompressSettings", "Size", "VqvaeSettings"]


Size = tuple[int, int, int]


class VqvaeSettings(TrainSettings):
    """What `train_vqvae` trains, on what, for how long. Triples are (time, y, x) in voxels."""

    warehouse: str | None = Field(
        None,
        description=(
            "Warehouse, or one of its versions; null means the newest version under "
            "build.output_root."
        ),
    )
    # With a norm of 10 and a learning rate of 3e-3, the loss of a run went from 0.1 to 66 within 12
    # steps and 20 epochs were lost; at 1 with 2e-3 no such step occurred in four runs
    # (docs/log.md).
    clip_norm: float = Field(
        1.0,
        gt=0,
        description=(
            "Largest norm of the gradients; at 10, training with many levels has diverged."
        ),
    )
    # After 14.5 minutes on NAIP `ema` left 2% of its first codes unused and `fsq` 26%, at almost
    # twice the error (docs/log.md). `fsq` stays as the control that cannot collapse.
    quantizer: Literal["ema", "fsq"] = Field(
        "ema",
        description=(
            "ema updates its codebooks from the encoder's outputs; fsq uses a fixed grid,"
            " which cannot collapse."
        ),
    )
    codebook_size: int = Field(
        512,
        ge=4,
        le=65_536,
        description=(
            "Number of codes per level; for fsq it must be a product of whole numbers from 4 to 8."
        ),
    )
    # Latent vectors of 8 numbers were what limited the error, not the grid: eight components of a 4
    # x 4 patch cannot pass 24.7 dB, and 32 of them reach 30.6 (docs/log.md).
    code_dim: int = Field(
        64,
        ge=1,
        le=1024,
        description="Length of a latent vector; fsq derives its own from codebook_size.",
    )
    levels: int = Field(
        8,
        ge=1,
        le=32,
        description="Number of residual levels; each encodes the residual of the previous levels.",
    )
    level_dropout: float = Field(
        0.3,
        ge=0,
        le=1,
        description=(
            "Share of training samples decoded from a random number of levels, so that any"
            " number can be used."
        ),
    )
    # The commitment is a mean over the numbers of a vector, so the weight grows with code_dim: 0.1
    # for 8, 0.4 for 32, 0.8 for 64. With 0.1 for 32 the encoder ran away and every level collapsed
    # (docs/log.md).
    beta: float = Field(
        0.8,
        ge=0,
        description=(
            "Weight of the commitment loss, which moves the outputs of the encoder towards their "
            "codes."
        ),
    )
    cat_weight: float = Field(0.1, ge=0, description="Weight of the loss of categorical features.")
    canopy_weight: float = Field(0.2, ge=0, description="Weight of the loss of canopy features.")
    huber: float | None = Field(
        None,
        gt=0,
        description=(
            "Scaled error above which the loss is linear instead of quadratic; null means never."
        ),
    )
    # Ten dates in one position are better under 0.02 bits a value only, and leave half as many
    # blocks to train on (docs/log.md).
    stride: Size = Field(
        (5, 4, 4),
        description=(
            "Voxels (time, y, x) per latent position; it must divide the window or, if window "
            "is null, the inner chunk."
        ),
    )
    patch: Size = Field(
        (5, 4, 4),
        description=(
            "Voxels (time, y, x) that the stem folds into channels; it must divide the stride."
        ),
    )
    width: int = Field(
        128, ge=8, le=4096, multiple_of=8, description="Number of channels of the network."
    )
    depth: int = Field(
        4, ge=0, le=64, description="Number of residual blocks in the encoder and in the decoder."
    )
    decay: float = Field(
        0.99, gt=0, lt=1, description="Decay of the moving averages of the codebooks."
    )
    # Six numbers a vector reached a perplexity of 225 in 14.5 minutes, and 212 in 6 minutes with a
    # share of 0.35 (docs/log.md).
    dead_share: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Replace a code whose average count is below this share of the mean.",
    )
    collapse_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description=(
            "A codebook counts as collapsed when its perplexity is below this share of the"
            " largest possible."
        ),
    )
    collapse_steps: int = Field(
        20,
        ge=1,
        description=(
            "Number of steps for which a codebook must stay collapsed before it is "
            "initialised again."
        ),
    )
    start_step: int = Field(
        5,
        ge=0,
        description=(
            "Number of steps without quantisation before the codebooks are initialised by k-means."
        ),
    )
    window: Size | None = Field(
        None,
        description=(
            "Size (time, y, x) of the part of an inner chunk that is one sample; null means"
            " the whole chunk."
        ),
    )
    min_valid_share: float = Field(
        0.1, ge=0, le=1, description="Leave out inner chunks with a smaller share of valid voxels."
    )
    # `random` reads every stored chunk for every batch, for a loss of 0.155 instead of the 0.158 of
    # four chunks a batch and the 0.177 of one (docs/log.md).
    sampling: Literal["chunk", "random"] = Field(
        "chunk",
        description=(
            "chunk draws each batch from loader.chunks_per_batch stored chunks; random draws"
            " it from all chunks."
        ),
    )
    flips: bool = Field(
        True, description="Augment with quarter turns and mirror images in y and x."
    )


class CompressSettings(Section):
    """What `compress_zarr` makes of a cube and a trained VQ-VAE."""

    warehouse: Annotated[str | None, RECORDED_APART] = Field(
        None,
        description=(
            "Warehouse of a cube, or one of its versions; null means the newest under "
            "build.output_root."
        ),
    )
    checkpoint: Annotated[str, RECORDED_APART] = Field(
        "checkpoints/vqvae", description="Trained VQ-VAE: its folder or its checkpoint.json."
    )
    output_root: Annotated[str, NOT_CONTENT] = Field(
        "artifacts/codes", description="Warehouse in which the version of codes is published."
    )
    levels: int | None = Field(
        None,
        ge=1,
        le=32,
        description="Number of residual levels to keep; null keeps all levels of the model.",
    )
    # Saves 13-15% of the bits at equal error, 7-10% with 32 numbers and 6 levels (docs/log.md).
    rate_weight: float = Field(
        0.2,
        ge=0,
        le=1000,
        description=(
            "Cost of a bit in thousandths of the latent variance; a higher cost saves bits, and 0 "
            "means the nearest codes."
        ),
    )
    # Four paths instead of one are worth 0.1 dB (docs/log.md).
    paths: int = Field(
        4,
        ge=1,
        le=64,
        description="Number of candidate code sequences per level; 1 is faster and slightly worse.",
    )
    # A chunk for each sample would cost 36 bytes of header, checksum and index entry for 200-600
    # bytes of codes (docs/compression.md).
    shard_samples: int = Field(
        256,
        ge=1,
        le=65_536,
        description="Samples per stored chunk of codes, which is decoded as a whole.",
    )
    reconstruct: Annotated[str | None, NOT_CONTENT] = Field(
        None, description="Warehouse in which the reconstructed cube is published; null means none."
    )
    report: Annotated[str | None, NOT_CONTENT] = Field(
        None,
        description="Folder for the rate-distortion report on held-out blocks; null means none.",
    )
    report_samples: Annotated[int, NOT_CONTENT] = Field(
        2048, ge=1, description="Largest number of held-out blocks in the report."
    )
    workers: Annotated[int, NOT_CONTENT] = Field(
        0,
        ge=0,
        le=256,
        description=(
            "Number of worker processes; 0 encodes in this process with all threads of PyTorch."
        ),
    )
    if_exists: Annotated[Literal["skip", "clear"], NOT_CONTENT] = Field(
        "skip",
        description=(
            "What to do if the version exists: skip the encoding, or clear the version and encode "
            "the cube again."
        ),
    )
    device: Annotated[str, NOT_CONTENT] = Field(
        "cpu",
        description=(
            "Device to compute on: auto (a GPU if there is one), cpu, cuda, cuda:1, and so on."
        ),
    )
