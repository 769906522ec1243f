"""The interface by which a package hands over a trained model that encodes images.

Purpose: `Backbone`, the network with its blocks and normalisation, and `Backbones`, the table of
  functions that open one kind of checkpoint each.
Used by: detector.backbone, features.encoders.open_encoder, scripts._backbones, vqvae.image_encoder
Design notes: packages of models do not import each other. A package returns a `Backbone` for its
  own kinds, and the command joins the tables; `features` only sees this interface.
Assistant guidance: when extending: a new kind of model adds a function that returns a Backbone and
  one line to `our_backbones` in scripts/_backbones.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from utils.training.checkpoint import Checkpoint

__all__ = ["Backbone", "Backbones"]


@dataclass(frozen=True, slots=True)
class Backbone:
    """A model of ours as a backbone.

    Attributes
    ----------
    name
        Shown in logs and recorded in the recipe of a feature version.
    network
        float32 [B, 3, H, W], normalised by `mean` and `std`, to a float32 map [B, D, h, w].
    blocks
        Modules in the order of the forward pass. Fine-tuning unfreezes them from the end.
    mean, std
        Of each channel, for values in [0, 1].
    recipe
        JSON that builds the same network again, without its weights.
    """

    name: str
    network: nn.Module
    blocks: Sequence[nn.Module]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: dict[str, Any] = field(default_factory=dict)


Backbones = Mapping[str, Callable[[Checkpoint | dict[str, Any]], Backbone]]
"""Kind of model -> function that opens a checkpoint of it, or builds it from a recipe with fresh
weights."""
