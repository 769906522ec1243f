"""The encoders of this project's own trainers, for the commands that take any encoder.

`features` does not import the packages of the models; the commands pass these in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from utils.training.backbone import Backbones

__all__ = ["our_backbones"]


def our_backbones() -> Backbones:
    """What restores the encoder of a checkpoint, by the kind of model that the checkpoint names."""
    from detector.backbone import detector_trunk
    from vqvae.image_encoder import vqvae_trunk

    return {"tiny": detector_trunk, "big": detector_trunk, "vqvae": vqvae_trunk}
