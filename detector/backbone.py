"""A trained detector's trunk as a backbone for features.

Pictures to the map that its head reads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from detector.model import COARSEST, make_model
from detector.task import restore_detector
from utils.training.backbone import Backbone
from utils.training.checkpoint import Checkpoint

__all__ = ["TrunkMap", "detector_trunk"]


class TrunkMap(nn.Module):
    """float [B, 3, H, W] in [-1, 1] -> [B, 2w, H/8, W/8].

    Pictures are padded to whole cells of the coarsest grid.
    """

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[2:]
        said: Tensor = self.trunk(
            nn.functional.pad(picture, (0, -width % COARSEST, 0, -height % COARSEST))
        )
        return said


def detector_trunk(source: Checkpoint | dict[str, Any]) -> Backbone:
    """The trunk of a detector as a backbone.

    source: a detector's checkpoint, or a recipe, which gives the same network with fresh weights.
    Raises as `restore_detector`; KeyError, TypeError and ValueError for a recipe that is none.
    """
    if isinstance(source, Checkpoint):
        model = restore_detector(source)[0]
    else:
        kind, width = str(source["kind"]), int(source["width"])
        if kind not in {"tiny", "big"} or not 1 <= width <= 512:
            raise ValueError(f"kind {kind:.20}, width {width}")
        model = make_model(kind=kind, width=width)
    trunk = model.grid.trunk
    return Backbone(
        f"detector-{model.kind}",
        TrunkMap(trunk),
        list(trunk.children()),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        recipe={"kind": model.kind, "width": model.width},
    )
