"""A trained VQ-VAE as a codec: blocks of a cube to integer codes and back, from a checkpoint alone.

Deterministic on one machine: weights are the run's averaged ones, in eval mode, float32, and blocks
do not know of each other (a batch of two gives what two batches of one give up to rounding of sums;
codes are compared by distance, so ties aside the same).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
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

__all__ = ["CubeCodec", "restore_vqvae"]

LIMITS = {"width": 4096, "depth": 64, "codebook_size": 65_536, "code_dim": 1024, "levels": 32}


class CubeCodec:
    """features; block, grid (time, y, x) in voxels and latent positions; levels; codebook_size;
    decoder_bytes: float32 weights that decoding needs, without codebook_bytes."""

    def __init__(self, model: VQVAE, path: Path, device: torch.device | str = "cpu") -> None:
        """Raises ConfigError for a device that cannot be used."""
        self.device, self.path = choose_device(str(device)), path
        self.model = model.to(self.device).eval().requires_grad_(False)
        shape = model.shape
        self.features, self.block, self.grid = model.channels.features, shape.block, shape.grid
        self.levels, self.codebook_size = shape.levels, shape.codebook_size
        parts = (model.spread, model.decoder, model.head)
        self.decoder_bytes = 4 * (
            sum(value.numel() for part in parts for value in part.parameters())
            + model.place.numel()
        )
        self.codebook_bytes = (
            4 * shape.levels * shape.codebook_size * model.quantizer.dim
            if shape.quantizer == "ema"
            else 0
        )

    @torch.inference_mode()
    def vectors(self, data: Tensor, valid: Tensor) -> Tensor:
        """float32 [B, t, y, x, D], on the codec's device: what a block's codes approximate. data.

        Float32 [B, T, Y, X, F], valid: bool.
        """
        latent = self.model.latent(data.to(self.device), valid.to(self.device)).movedim(1, -1)
        return self.model.quantizer.measured(latent.flatten(0, -2)).view(latent.shape)

    @property
    def tables(self) -> list[Tensor]:
        """What each code of each level adds to a vector, float32 [K, D] a level."""
        return self.model.quantizer.tables()

    @torch.inference_mode()
    def encode(self, data: Tensor, valid: Tensor, search: CodeSearch | None = None) -> Tensor:
        """data: float32 [B, T, Y, X, F], valid: bool; codes int64 [B, levels, t, y, x] in
        0..codebook_size-1.

        search: how they are chosen, and for how many levels; None: the nearest at each level.
        """
        if search is None:
            return self.model.encode(data.to(self.device), valid.to(self.device)).cpu()
        vectors = self.vectors(data, valid)
        rows = search.choose(vectors.flatten(0, -2), self.tables[: len(search.price)])
        return rows.view(*vectors.shape[:-1], -1).movedim(-1, 1).cpu()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """codes: int64 [B, l, t, y, x], the first l levels of `levels`; data float32 [B, T, Y, X,
        F] in physical units and codes.

        Every voxel gets a value: keep `valid` beside the codes.
        """
        return self.model.decode(codes.to(self.device)).cpu()


def restore_vqvae(
    path: Path | str, features: Sequence[Feature] | None = None, device: torch.device | str = "cpu"
) -> CubeCodec:
    """The codec of a checkpoint (its folder or checkpoint.json).

    features: those of the cube to be encoded; name, kind and codes must be the checkpoint's, in
    order. Statistics are the checkpoint's. Raises StateError for another model or other features,
    CorruptError and ConfigError as `load_checkpoint`.
    """
    checkpoint = load_checkpoint(Path(path))
    remedy = "train one with python -m scripts.train_vqvae"
    said = known_model(checkpoint, ("vqvae",), "a VQ-VAE", remedy)
    try:
        if said.pop("scaling", None) != SCALING:
            raise ValueError("features are scaled otherwise than here")
        table = tuple(Feature.of(dict(raw)) for raw in said.pop("features"))
        shape = _shape(said)
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


def _shape(said: dict[str, Any]) -> Shape:
    known = {field.name: said[field.name] for field in fields(Shape)}
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
    one, other = (
        [(feature.name, feature.kind, tuple(sorted(feature.codes))) for feature in table]
        for table in (trained, wanted)
    )
    if one != other:
        place = next(
            (
                place
                for place, pair in enumerate(zip(one, other, strict=False))
                if pair[0] != pair[1]
            ),
            min(len(one), len(other)),
        )
        said = [_words(table[place]) if place < len(table) else "nothing" for table in (one, other)]
        raise StateError(
            "the checkpoint was trained on other features",
            where=path,
            expected=f"{said[0]} as feature {place}",
            found=said[1],
            remedy="train on this cube with python -m scripts.train_vqvae",
        )


def _words(feature: tuple[str, str, tuple[int, ...]]) -> str:
    name, kind, codes = feature
    return f"{name} ({kind}{' ' + str(list(codes)) if codes else ''})"
