"""The trunk of a trained detector as a backbone for features.

It turns images into the map that the detector's head reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from detector.model import COARSEST, make_model
from detector.task import restore_detector
from utils.training.backbone import Backbone
from utils.training.checkpoint import Checkpoint

__all__ = ["TrunkMap", "detector_trunk"]


class TrunkMap(nn.Module):
    """Features [B, 2w, H/8, W/8] of images float [B, 3, H, W] in [-1, 1].

    Images are padded to whole cells of the coarsest grid.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, image: Tensor) -> Tensor:
        """Return the map of a batch of images."""
        height, width = image.shape[2:]
        padded = nn.functional.pad(image, (0, -width % COARSEST, 0, -height % COARSEST))
        features: Tensor = self.trunk(padded)
        return features


def detector_trunk(source: Checkpoint | Mapping[str, object]) -> Backbone:
    """Return the trunk of a detector as a backbone.

    Parameters
    ----------
    source
        A detector's checkpoint; or a recipe, which gives the same network with fresh weights.

    Raises
    ------
    StateError
        For a checkpoint that is not of a detector.
    KeyError, TypeError, ValueError
        For a mapping that is not a recipe.
    """
    if isinstance(source, Checkpoint):
        model = restore_detector(source)[0]
    else:
        kind, width = str(source["kind"]), int(str(source["width"]))
        # A recipe comes from a manifest, so its numbers may be anybody's: a huge width would fill
        # the memory.
        if kind not in {"tiny", "big"} or not 1 <= width <= 512:
            raise ValueError(f"kind {kind:.20}, width {width}")
        model = make_model(kind=kind, width=width)
    trunk = model.grid.trunk
    # The mean and deviation that turn [0, 1] into the [-1, 1] of `to_float`.
    return Backbone(
        f"detector-{model.kind}",
        TrunkMap(trunk),
        list(trunk.children()),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        recipe={"kind": model.kind, "width": model.width},
    )
