"""A trained VQ-VAE's encoder as a backbone for images: features of raster blocks, applied to them.

An image has neither time nor units, so the mapping is a convention, defined here: the image is
repeated for all time steps of a block; its channels, normalised as values of 0.5 +- 0.25, take the
place of the scaled features; every voxel is valid; and the grid grows to the image's size. The map
is the output of the last residual block, before it is squeezed into a code, averaged over time.
Only models of one continuous feature (given the image's luma) or of three (by name where they are
red, green and blue, else in order) can be filled in this way. Any other model is refused rather
than padded with guesses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.training.backbone import Backbone
from utils.training.checkpoint import Checkpoint
from vqvae.compress.codec import restore_vqvae
from vqvae.network.layers import Residual, Triple, space_to_depth
from warehouse.errors import StateError
from warehouse.layouts.features import Feature

__all__ = ["ImageMap", "vqvae_trunk"]

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue, of ITU-R BT.601."""

RGB = ("red", "green", "blue")

# A recipe may come from any checkpoint of a head: without limits it could ask for a network that
# fills the memory.
LIMITS = {"width": 4096, "depth": 64}


class ImageMap(nn.Module):
    """The stem and the residual blocks of a VQ-VAE's encoder, over images of any size.

    Parameters
    ----------
    order
        Which channel of the image each feature is; () for one feature, the luma.
    grid
        Positions (t, y, x) of a training block, which decide where kernels are 3 wide.
    patch
        Voxels (t, y, x) that the stem folds.
    width, depth
        Channels, and residual blocks.
    """

    def __init__(
        self,
        *,
        order: tuple[int, ...],
        grid: tuple[int, int, int],
        patch: tuple[int, int, int],
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.order, self.grid, self.patch, self.width, self.depth = order, grid, patch, width, depth
        # Values and validity of each feature, as VQVAE stacks them.
        self.stem = nn.Conv3d(2 * max(1, len(order)) * math.prod(patch), width, 1)
        self.encoder = nn.Sequential(*(Residual(width, grid) for _ in range(depth)))
        self.luma: Tensor
        self.register_buffer("luma", torch.tensor(LUMA).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return the feature map of images.

        Parameters
        ----------
        image
            float [B, 3, H, W], 0 where the image is 0.5 and 1 where it is 0.75.

        Returns
        -------
        Tensor
            float [B, width, ceil(H / patch y), ceil(W / patch x)].
        """
        if self.order:
            value = image[:, list(self.order)]
        else:
            value = (image * self.luma).sum(dim=1, keepdim=True)

        # The edge is padded as missing, which the encoder was trained with, and not as black.
        height, width = value.shape[2:]
        edges = (0, -width % self.patch[2], 0, -height % self.patch[1])
        known = nn.functional.pad(torch.ones_like(value), edges)
        flat = torch.cat([nn.functional.pad(value, edges), known], dim=1)

        dates = self.grid[0] * self.patch[0]
        block = flat.unsqueeze(2).expand(-1, -1, dates, -1, -1)
        found: Tensor = self.encoder(self.stem(space_to_depth(block, self.patch)))
        return found.mean(dim=2)

    def recipe(self) -> dict[str, Any]:
        """Return JSON from which `vqvae_trunk` makes the same network."""
        return {
            "kind": "vqvae",
            "order": list(self.order),
            "grid": list(self.grid),
            "patch": list(self.patch),
            "width": self.width,
            "depth": self.depth,
        }


def vqvae_trunk(source: Checkpoint | dict[str, Any]) -> Backbone:
    """Return the encoder of a VQ-VAE as a backbone of its stem and its residual blocks.

    Parameters
    ----------
    source
        A VQ-VAE's checkpoint, or a recipe, which gives the same network with fresh weights.

    Raises
    ------
    StateError
        The model has features that images cannot fill; else as `restore_vqvae`.
    KeyError, TypeError, ValueError
        The recipe is not one of an `ImageMap`.
    """
    if isinstance(source, Checkpoint):
        model = restore_vqvae(source.path).model
        shape = model.shape
        t, y, x = (size // step for size, step in zip(shape.block, shape.patch, strict=True))
        network = ImageMap(
            order=_order(model.channels.features, source),
            grid=(t, y, x),
            patch=shape.patch,
            width=shape.width,
            depth=shape.depth,
        )
        network.stem.load_state_dict(model.stem.state_dict())
        network.encoder.load_state_dict(model.encoder.state_dict())
    else:
        network = _plain(source)
    return Backbone(
        "vqvae",
        network,
        [network.stem, *network.encoder],
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        recipe=network.recipe(),
    )


def _order(features: Sequence[Feature], source: Checkpoint) -> tuple[int, ...]:
    """Return the image's channel of each feature, or () for the luma."""
    names = [feature.name for feature in features]
    continuous = all(feature.kind == "continuous" for feature in features)
    if not continuous or len(names) not in {1, 3}:
        raise StateError(
            "images cannot fill this VQ-VAE's features",
            where=source.path,
            expected="one continuous feature, or three",
            found=", ".join(f"{feature.name} ({feature.kind})" for feature in features)[:160],
            remedy="train one on such a cube, or choose another --features.encoder",
        )
    if len(names) == 1:
        return ()
    if set(names) == set(RGB):
        return tuple(RGB.index(name) for name in names)
    return 0, 1, 2


def _plain(recipe: dict[str, Any]) -> ImageMap:
    """Make the network of a recipe, which may be anything that a file contained."""
    order = tuple(int(value) for value in recipe["order"])
    if len(order) not in {0, 3} or any(not 0 <= value <= 2 for value in order):
        raise ValueError(f"order {order}")

    width, depth = int(recipe["width"]), int(recipe["depth"])
    if not (8 <= width <= LIMITS["width"] and 0 <= depth <= LIMITS["depth"]):
        raise ValueError(f"width {width}, depth {depth}")

    grid, patch = _triple(recipe["grid"]), _triple(recipe["patch"])
    return ImageMap(order=order, grid=grid, patch=patch, width=width, depth=depth)


def _triple(values: Sequence[int | str]) -> Triple:
    t, y, x = (int(value) for value in values)
    if not all(1 <= value <= 4096 for value in (t, y, x)):
        raise ValueError(f"grid or patch {(t, y, x)}")
    return t, y, x
