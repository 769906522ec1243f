"""Heads on cached features: linear, MLP, and attention over the spatial map.

A head takes features as they are stored and standardises them itself, so that it needs nothing but
its checkpoint. All heads share one class; they differ in `kind`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from features.settings import HeadSettings

__all__ = ["Head", "make_head"]


class Head(nn.Module):
    """Standardise features, then classify them: [B, D], or [B, cells, D] for attention, to logits.

    The mean and deviation are of the training split and are saved with the head, so that it takes
    features as they are stored.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, kind: str, width: int, classes: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        if kind == "linear":
            self.body: nn.Module = nn.Linear(width, classes)
        else:
            self.body = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
            )
        self.attention = nn.Linear(width, 1) if kind == "attention" else None

    def fit_scale(self, rows: Tensor) -> None:
        """Take mean and deviation from `rows`, float32 [n, D] of the training split."""
        self.mean.copy_(rows.mean(dim=0))
        # A feature that never varies carries no information: it becomes 0 instead of dividing by 0.
        deviation = rows.std(dim=0)
        self.deviation.copy_(torch.where(deviation > 1e-6, deviation, torch.inf))

    def scaled(self, value: Tensor) -> Tensor:
        """Standardise pooled rows [B, D], or maps [B, D, h, w] as cells [B, h * w, D]."""
        if value.ndim == 4:
            value = value.float().flatten(2).transpose(1, 2)
        return (value - self.mean) / self.deviation

    def forward(self, scaled: Tensor) -> Tensor:
        """Logits float32 [B, C] of standardised features."""
        # A weighted mean over the cells, whose weights one linear layer learns.
        if self.attention is not None:
            scaled = (self.attention(scaled).softmax(dim=1) * scaled).sum(dim=1)
        logits: Tensor = self.body(scaled)
        return logits


def make_head(settings: HeadSettings, width: int, classes: int) -> Head:
    """Return a head with fresh weights from `settings.seed`.

    The global random generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Head(settings.kind, width, classes, settings.hidden, settings.dropout)
