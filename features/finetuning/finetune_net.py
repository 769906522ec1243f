"""The network that is fine-tuned: an encoder with a new linear head, and which of its parameters
and batch norms are trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from features.encoders.network import NetworkEncoder

__all__ = ["FinetuneNet", "recompute_blocks", "trained_levels", "trained_norms"]


class FinetuneNet(nn.Module):
    """Images -> encoder -> layer norm -> linear: logits float [B, C].

    `train()` puts nothing into training mode but the batch norms in `moving`: dropout and frozen
    norms stay in eval mode, so that a step is a function of (seed, epoch, samples).
    """

    def __init__(self, encoder: NetworkEncoder, classes: int) -> None:
        super().__init__()
        self.encoder, self.network = encoder, encoder.network
        self.norm, self.head = nn.LayerNorm(encoder.width), nn.Linear(encoder.width, classes)
        # Empty while the head learns alone: frozen blocks keep their statistics.
        self.moving: list[nn.Module] = []
        """Batch norms whose statistics follow the training batches."""

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of [B, 3, H, W], uint8 or float in [0, 1]."""
        logits: Tensor = self.head(self.norm(self.encoder(pictures).pooled))
        return logits

    def train(self, mode: bool = True) -> FinetuneNet:
        """Put the batch norms in `moving` into training mode, and all else into eval mode."""
        super().train(False)
        self.training = mode
        for norm in self.moving if mode else ():
            norm.training = True
        return self


class Recomputed:
    """A block's forward pass that keeps only its inputs and runs again in the backward pass.

    See arXiv:1604.06174. The state of the random generator is not kept, since nothing in a block is
    random in eval mode.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        forward = type(self.block).forward
        # Without gradients nothing is kept, and there is nothing to recompute.
        if not torch.is_grad_enabled():
            return forward(self.block, *inputs, **named)
        return checkpoint(
            forward, self.block, *inputs, use_reentrant=False, preserve_rng_state=False, **named
        )


def recompute_blocks(encoder: NetworkEncoder, count: int | None) -> None:
    """Let the last `count` blocks, or all where it is None, recompute their activations."""
    blocks = encoder.blocks if count is None else encoder.last_blocks(count)
    for block in blocks:
        # An attribute of the instance: a wrapping module would change the names of the weights.
        block.forward = Recomputed(block)


def trained_levels(encoder: NetworkEncoder, count: int | None) -> list[list[nn.Parameter]]:
    """Parameters to train, by their distance from the end of the network.

    Parameters
    ----------
    count
        Number of blocks to train; None trains the whole network.

    Returns
    -------
    list of list
        First the last block with what the network registered after it, then the block before, and
        so on. The last list is what comes before all blocks; it is empty unless `count` is None.

    Raises
    ------
    ConfigError
        `count` is more than the encoder has.
    """
    blocks = encoder.blocks if count is None else encoder.last_blocks(count)
    block_of = {
        id(parameter): number
        for number, block in enumerate(encoder.blocks)
        for parameter in block.parameters()
    }
    parameters = list(encoder.network.parameters())
    in_blocks = [at for at, parameter in enumerate(parameters) if id(parameter) in block_of]
    end = max(in_blocks, default=-1)

    levels: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 1)]
    for at, parameter in enumerate(parameters):
        if id(parameter) in block_of:
            distance = len(encoder.blocks) - 1 - block_of[id(parameter)]
        elif at > end:
            distance = 0
        else:
            distance = len(blocks)
        if distance < len(blocks) or (count is None and distance == len(blocks)):
            levels[distance].append(parameter)
    return levels


def trained_norms(network: nn.Module, trained: list[nn.Parameter]) -> list[nn.Module]:
    """The batch norms of a network all of whose parameters are trained."""
    known = {id(parameter) for parameter in trained}
    return [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm)
        and all(id(parameter) in known for parameter in module.parameters())
    ]
