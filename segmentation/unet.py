"""A small U-Net, from uint8 images to a logit for every class and pixel.

It follows Ronneberger et al. 2015 (arXiv:1505.04597), with residual blocks, GroupNorm (batches are
small) and a space-to-depth stem: `stem` x `stem` pixels are folded into channels, all layers work
on the smaller grid, and the head unfolds its logits again, so that the output keeps every pixel at
a fraction of the work. No layer sees beyond its own sample. It has neither attention nor deep
supervision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.training.checkpoint import Checkpoint, known_model, load_module
from warehouse.errors import StateError

__all__ = ["UNet", "restore_unet"]

KIND = "unet"
LIMITS = {
    "channels": (1, 64),
    "classes": (2, 255),
    "width": (4, 512),
    "levels": (1, 6),
    "stem": (1, 4),
}
"""Of what a checkpoint may ask for, so that a damaged one cannot exhaust memory."""


class Block(nn.Module):
    """Two 3 x 3 convolutions with a residual path: [B, in, h, w] -> [B, out, h, w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.first_norm = group_norm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = group_norm(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(self.first_norm(self.first(x)))
        return functional.silu(self.second_norm(self.second(y)) + self.skip(x))


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm with groups of 8 channels where that is possible, else with one group."""
    return nn.GroupNorm(max(1, channels // 8) if channels % 8 == 0 else 1, channels)


class UNet(nn.Module):
    """A U-Net with a folded stem.

    Parameters
    ----------
    channels
        Of the image, 1 or 3.
    classes
        Logits of each pixel.
    width
        Channels of the first level; they double at each of `levels`.
    stem
        Side of the square of pixels that is folded into channels. Full resolution, a stem of 1,
        did not score better on membranes (docs/log.md).
    """

    def __init__(
        self, *, channels: int, classes: int, width: int = 24, levels: int = 4, stem: int = 2
    ) -> None:
        super().__init__()
        self.channels = channels
        self.classes = classes
        self.width = width
        self.levels = levels
        self.stem = stem
        widths = [width * 2**level for level in range(levels)]
        inputs = [channels * stem**2, *widths]
        # Changing the order in which modules are made would change their initial weights, and with
        # them every run of a given seed.
        self.down = nn.ModuleList(Block(inputs[at], widths[at]) for at in range(levels))
        # Halved before enlarging, where a pixel costs a quarter of what it costs afterwards.
        self.narrow = nn.ModuleList(nn.Conv2d(2 * outputs, outputs, 1) for outputs in widths[:-1])
        self.up = nn.ModuleList(Block(2 * outputs, outputs) for outputs in widths[:-1])
        self.head = nn.Conv2d(width, classes * stem**2, 1)

    @property
    def multiple(self) -> int:
        """Pixels that the height and width of an image must be multiples of."""
        return int(self.stem * 2 ** (self.levels - 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch.

        Parameters
        ----------
        image
            uint8 or float [B, C, H, W] in [0, 255], H and W multiples of `multiple`.

        Returns
        -------
        Tensor
            float [B, classes, H, W].
        """
        # From [0, 255] to about [-2, 2].
        scaled = image.float() / 64 - 2
        x = functional.pixel_unshuffle(scaled, self.stem)
        x = x.contiguous(memory_format=torch.channels_last)
        passed: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            passed.append(x)
        for level in reversed(range(self.levels - 1)):
            x = functional.interpolate(self.narrow[level](x), scale_factor=2, mode="nearest")
            x = self.up[level](torch.cat([x, passed[level]], dim=1))
        return functional.pixel_shuffle(self.head(x), self.stem)

    def describe(self) -> dict[str, Any]:
        """Return JSON from which `restore_unet` builds the model."""
        return {"kind": KIND, **{key: getattr(self, key) for key in LIMITS}}


def restore_unet(checkpoint: Checkpoint) -> UNet:
    """Return the model of a checkpoint, with its averaged weights, in eval mode.

    Raises
    ------
    StateError
        The checkpoint is not of this project's U-Net, or asks for a shape outside LIMITS.
    """
    remedy = "train one with python -m scripts.segment_patches"
    model = known_model(checkpoint, (KIND,), "a U-Net", remedy)
    try:
        shape = {key: int(model[key]) for key in LIMITS}
        wrong = [
            f"{key} {value}"
            for key, value in shape.items()
            if not LIMITS[key][0] <= value <= LIMITS[key][1]
        ]
        if wrong:
            raise ValueError(", ".join(wrong))
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(
            "the checkpoint is not of a U-Net",
            where=checkpoint.path,
            found=str(error),
            remedy=remedy,
        ) from None
    unet = UNet(**shape)
    load_module(unet, checkpoint.part("average"), checkpoint.path)
    unet.eval()
    return unet
