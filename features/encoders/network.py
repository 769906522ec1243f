"""A network as an encoder: images in, a pooled vector and a spatial map out, and a fingerprint of
all that decides the numbers.

Networks run in eval mode, so the features of an image do not depend on the other images of its
batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from warehouse.errors import ConfigError

__all__ = [
    "FINETUNED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Encoded",
    "Encoder",
    "NetworkEncoder",
    "he_init",
    "weights_digest",
]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESIZE = "bilinear, antialiased"
FINETUNED = "finetuned"
"""Kind of a checkpoint that holds a fine-tuned encoder; see `NetworkEncoder.describe`."""


class Encoded(NamedTuple):
    """Features of a batch.

    Attributes
    ----------
    pooled
        float32 [B, D].
    spatial
        float32 [B, D, h, w].
    """

    pooled: Tensor
    spatial: Tensor


class Encoder(Protocol):
    """What extraction asks of an encoder.

    Attributes
    ----------
    name
        Recorded in the recipe of a feature version.
    random
        Whether the weights were drawn at random and never trained.
    width
        Number of features D.
    size
        (H, W) that images are resized to; None uses them as they are.
    """

    name: str
    random: bool
    width: int
    size: tuple[int, int] | None

    def __call__(self, pictures: Tensor) -> Encoded:
        """Encode [B, 3, H, W], uint8 in [0, 255] or float in [0, 1]."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON: name, random, sha256 of the weights, preprocessing."""

    def last_blocks(self, count: int) -> list[nn.Module]:
        """The last `count` blocks, in the order of the forward pass."""


class NetworkEncoder:
    """Any network behind the `Encoder` protocol.

    Parameters
    ----------
    name
        Recorded in the fingerprint.
    network
        Normalised float32 [B, 3, H, W] to a map [B, D, h, w], or to (map, pooled [B, D]). Without
        pooled features, the mean over the map is used.
    blocks
        Modules of the network in the order of the forward pass.
    size
        (H, W) that images are resized to; None uses them as they are.
    random
        Whether the weights were drawn at random.
    mean, std
        Of each channel, for values in [0, 1].
    recipe
        JSON that builds the network again. An encoder without one cannot be fine-tuned, since its
        checkpoint could not be opened.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        size: tuple[int, int] | None,
        random: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.random = random
        self.size = size
        self.recipe = recipe or {}
        # Eval mode: batch norms would mix the images of a batch, and dropout would draw numbers.
        self.network = network.eval().requires_grad_(False)
        self.blocks = list(blocks)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.weights_sha256 = weights_digest(network)
        # Only a forward pass tells the width of an arbitrary network. It also shows now, and not in
        # the first job, that the network cannot process images of this size.
        with torch.inference_mode():
            height, width = size or (64, 64)
            probe = torch.zeros(1, 3, height, width, dtype=torch.uint8)
            self.width = self(probe).pooled.shape[1]

    def __call__(self, pictures: Tensor) -> Encoded:
        """Encode [B, 3, H, W], uint8 in [0, 255] or float in [0, 1]."""
        output = self.network(self._normalised(pictures))
        spatial, pooled = output if isinstance(output, tuple) else (output, None)
        return Encoded(spatial.mean(dim=(2, 3)) if pooled is None else pooled, spatial)

    def resized(self, pictures: Tensor) -> Tensor:
        """Resize images to the encoder's size: float32 [B, 3, h, w] in [0, 1]."""
        value = pictures.float()
        if pictures.dtype == torch.uint8:
            value = value.mul_(1 / 255)
        # Images that were built at the encoder's size are not resampled.
        if self.size is not None and tuple(value.shape[2:]) != self.size:
            value = functional.interpolate(
                value, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        return value

    def _normalised(self, pictures: Tensor) -> Tensor:
        value = self.resized(pictures)
        mean = torch.tensor(self.mean, device=value.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=value.device).view(1, 3, 1, 1)
        # Channels last is the faster memory format for convolutions on CPUs.
        return ((value - mean) / std).contiguous(memory_format=torch.channels_last)

    def fingerprint(self) -> dict[str, Any]:
        """JSON of all that decides the numbers; it is part of a feature version's recipe."""
        # What is left out here could change without a new version of features.
        preprocessing = {
            "size": self.size and list(self.size),
            "resize": RESIZE,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        return {
            "name": self.name,
            "random": self.random,
            "weights_sha256": self.weights_sha256,
            "preprocessing": preprocessing,
        }

    def describe(self) -> dict[str, Any]:
        """JSON that builds the encoder again, without its weights; it includes the fingerprint."""
        # By name, so that blocks are found again in a network built from the recipe.
        names = {id(module): name for name, module in self.network.named_modules()}
        return {
            **self.fingerprint(),
            "recipe": self.recipe,
            "blocks": [names[id(block)] for block in self.blocks],
        }

    def last_blocks(self, count: int) -> list[nn.Module]:
        """The last `count` blocks, in the order of the forward pass.

        Raises ConfigError for more blocks than the encoder has.
        """
        if not 1 <= count <= len(self.blocks):
            raise ConfigError(
                "so many blocks cannot be unfrozen",
                where=self.name,
                expected=f"1 to {len(self.blocks)}",
                found=count,
            )
        return self.blocks[-count:]


def he_init(module: nn.Module, seed: int) -> None:
    """Initialise a network by He-normal weights (fan-in, arXiv:1502.01852).

    Weights of norms become 1 and all biases 0. The result depends on the shapes, their order and
    the seed alone.
    """
    # A generator of its own: numbers that the caller drew before must not change the features.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                deviation = math.sqrt(2 / part.weight[0].numel())
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * deviation)
            elif isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
                part.weight.fill_(1)
            if isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()
            bias = getattr(part, "bias", None)
            if isinstance(bias, Tensor):
                bias.zero_()


def weights_digest(module: nn.Module) -> str:
    """sha256 of every tensor's name, type, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    # Sorted: the order in which modules were registered does not change what they compute.
    for name, value in sorted(module.state_dict().items()):
        # With type and shape, since tensors of the same bytes may still differ.
        digest.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
