"""A trained detector's trunk as a backbone for features: pictures to the map that its head reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from detector.model import COARSEST
from detector.task import restore_detector
from utils.checkpoint import load_checkpoint

__all__ = ["TrunkMap", "detector_trunk"]


class TrunkMap(nn.Module):
    """float [B, 3, H, W] in [-1, 1] -> [B, 2w, H/8, W/8]; pictures are padded to whole cells of the coarsest grid."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[2:]
        said: Tensor = self.trunk(nn.functional.pad(picture, (0, -width % COARSEST, 0, -height % COARSEST)))
        return said


def detector_trunk(path: Path) -> tuple[str, nn.Module, list[nn.Module]]:
    """(name, network, its blocks in the order of the forward pass) of a checkpoint. Raises as `load_checkpoint`, `restore_detector`."""
    model, _ = restore_detector(load_checkpoint(path))
    return f"detector-{model.kind}", TrunkMap(model.grid.trunk), list(model.grid.trunk.children())
