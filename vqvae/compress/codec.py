"""A trained VQ-VAE as a codec: blocks of a cube to integer codes and back, from a checkpoint alone.

The codec is deterministic on one machine: the weights are the run's averaged ones, in eval mode and
float32, and blocks do not depend on each other. A batch of two blocks gives what two batches of one
give, up to the rounding of sums, which changes a code only where two are equally near.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.training.checkpoint import known_model, load_checkpoint, load_module
from utils.training.ranks import choose_device
from vqvae.compress.search import CodeSearch
from vqvae.network.model import SCALING, VQVAE, Shape
from vqvae.quantizers.codebook import CodebookRules
from warehouse.errors import StateError, WarehouseError
from warehouse.layouts.features import Feature

__all__ = ["CubeCodec", "checkpoint_digest", "open_codec", "restore_vqvae"]

# A checkpoint may come from anyone: without limits a small JSON file could ask for a model that
# fills the memory before its weights are even looked at.
LIMITS = {"width": 4096, "depth": 64, "codebook_size": 65_536, "code_dim": 1024, "levels": 32}


class CubeCodec:
    """A model that encodes and decodes blocks.

    Parameters
    ----------
    model
        The VQ-VAE with its weights.
    path
        Its checkpoint.json, for messages and for the digest.
    device
        Where to compute.

    Attributes
    ----------
    features
        The feature table that the model was trained on.
    block, grid
        Size of a block, (time, y, x) in voxels and in latent positions.
    levels, codebook_size
        Residual levels, and codes of each.
    decoder_bytes, codebook_bytes
        float32 weights that decoding needs, and the codebooks beside them.

    Raises
    ------
    ConfigError
        The device cannot be used.
    """

    def __init__(self, model: VQVAE, path: Path, device: torch.device | str = "cpu") -> None:
        self.device, self.path = choose_device(str(device)), path
        self.model = model.to(self.device).eval().requires_grad_(False)
        shape = model.shape
        self.features, self.block, self.grid = model.channels.features, shape.block, shape.grid
        self.levels, self.codebook_size = shape.levels, shape.codebook_size

        parts = (model.spread, model.decoder, model.head)
        weights = sum(value.numel() for part in parts for value in part.parameters())
        self.decoder_bytes = 4 * (weights + model.place.numel())
        # The grid of FSQ follows from the codebook's size: there is nothing to store.
        self.codebook_bytes = 0
        if shape.quantizer == "ema":
            self.codebook_bytes = 4 * shape.levels * shape.codebook_size * model.quantizer.dim

    @torch.inference_mode()
    def vectors(self, data: Tensor, valid: Tensor) -> Tensor:
        """Return what the codes of blocks approximate.

        Parameters
        ----------
        data, valid
            float32 and bool [B, T, Y, X, F].

        Returns
        -------
        Tensor
            float32 [B, t, y, x, D], on the codec's device.
        """
        latent = self.model.latent(data.to(self.device), valid.to(self.device)).movedim(1, -1)
        return self.model.quantizer.measured(latent.flatten(0, -2)).view(latent.shape)

    @property
    def tables(self) -> list[Tensor]:
        """What each code of each level adds to a vector, float32 [K, D] for each level."""
        return self.model.quantizer.tables()

    @torch.inference_mode()
    def encode(self, data: Tensor, valid: Tensor, search: CodeSearch | None = None) -> Tensor:
        """Encode blocks.

        Parameters
        ----------
        data, valid
            float32 and bool [B, T, Y, X, F].
        search
            How codes are chosen, and for how many levels; None for the nearest at each level.

        Returns
        -------
        Tensor
            int64 [B, levels, t, y, x] in 0..codebook_size-1, on the CPU.
        """
        if search is None:
            return self.model.encode(data.to(self.device), valid.to(self.device)).cpu()
        vectors = self.vectors(data, valid)
        rows = search.choose(vectors.flatten(0, -2), self.tables[: len(search.price)])
        return rows.view(*vectors.shape[:-1], -1).movedim(-1, 1).cpu()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes.

        Parameters
        ----------
        codes
            int64 [B, l, t, y, x], the first l of the levels.

        Returns
        -------
        Tensor
            float32 [B, T, Y, X, F] in physical units and class codes, on the CPU. Missing voxels
            get a value too, so `valid` must be kept beside the codes.
        """
        return self.model.decode(codes.to(self.device)).cpu()


def restore_vqvae(
    path: Path | str, features: Sequence[Feature] | None = None, device: torch.device | str = "cpu"
) -> CubeCodec:
    """Return the codec of a checkpoint.

    Parameters
    ----------
    path
        The checkpoint's folder or its checkpoint.json.
    features
        Of the cube to be encoded. Their names, kinds and codes must be those of the checkpoint, in
        the same order; None skips the comparison.
    device
        Where to compute.

    Raises
    ------
    StateError
        The checkpoint is of another model, or of other features; else as `load_checkpoint`.
    ConfigError
        The device cannot be used.
    """
    checkpoint = load_checkpoint(Path(path))
    remedy = "train one with python -m scripts.train_vqvae"
    description = known_model(checkpoint, ("vqvae",), "a VQ-VAE", remedy)
    try:
        # Weights fit whatever the features were divided by, so that a model of an earlier release
        # would load and decode to wrong units.
        if description.pop("scaling", None) != SCALING:
            raise ValueError("its features are scaled differently")

        # Statistics are the checkpoint's and not the cube's: they are part of what was learned.
        table = tuple(Feature.of(dict(raw)) for raw in description.pop("features"))
        shape = _shape(description)
        shape.check()
        model = VQVAE(table, shape, CodebookRules())
    except (KeyError, TypeError, ValueError, AttributeError, WarehouseError) as error:
        raise StateError(
            "the checkpoint is not of a VQ-VAE",
            where=checkpoint.path,
            found=str(error)[:200],
            remedy=remedy,
        ) from None
    if features is not None:
        _same_features(table, features, checkpoint.path)
    load_module(model, checkpoint.part("average"), checkpoint.path)
    return CubeCodec(model, checkpoint.path, device)


def checkpoint_digest(codec: CubeCodec) -> str:
    """Return the sha256 of the checkpoint's safetensors file."""
    return str(json.loads(codec.path.read_bytes())["sha256"])


@lru_cache(maxsize=2)
def open_codec(path: str, digest: str | None, device: str = "cpu") -> CubeCodec:
    """Return the codec of a checkpoint, opened once in each process.

    Parameters
    ----------
    path
        The checkpoint's folder or checkpoint.json.
    digest
        Of the checkpoint that the codes were made with; None accepts any.

    Raises
    ------
    StateError
        The checkpoint has another digest; else as `restore_vqvae`.
    """
    codec = restore_vqvae(path, device=device)
    found = checkpoint_digest(codec)
    if digest is not None and found != digest:
        raise StateError(
            "these codes were made with another checkpoint",
            where=codec.path,
            expected=f"sha256 {digest[:12]}",
            found=found[:12],
            remedy="name the one they were made with: --compress.checkpoint FOLDER",
        )
    return codec


def _shape(description: Mapping[str, Any]) -> Shape:
    known = {field.name: description[field.name] for field in fields(Shape)}
    for key in ("block", "stride", "patch"):
        known[key] = tuple(int(size) for size in known[key])
        if len(known[key]) != 3 or not all(1 <= size <= 4096 for size in known[key]):
            raise ValueError(f"{key} {known[key]}")

    for key, most in LIMITS.items():
        known[key] = int(known[key])
        if not 0 <= known[key] <= most:
            raise ValueError(f"{key} {known[key]}")
    if known["quantizer"] not in {"ema", "fsq"}:
        raise ValueError(f"quantizer {known['quantizer']!r:.40}")
    return Shape(**known)


def _same_features(trained: Sequence[Feature], wanted: Sequence[Feature], path: Path) -> None:
    # As text, with "nothing" where one table is shorter, so that the message can show the first
    # pair that differs.
    pairs = zip_longest(map(_text_of, trained), map(_text_of, wanted), fillvalue="nothing")
    for number, (expected, found) in enumerate(pairs):
        if expected != found:
            raise StateError(
                "the checkpoint was trained on other features",
                where=path,
                expected=f"{expected} as feature {number}",
                found=found,
                remedy="train on this cube with python -m scripts.train_vqvae",
            )


def _text_of(feature: Feature) -> str:
    codes = f" {sorted(feature.codes)}" if feature.codes else ""
    return f"{feature.name} ({feature.kind}{codes})"
