"""The optimizer of a run: its parameter groups, its state in a checkpoint, the running average.

Purpose: `parameter_groups` and `make_optimizer`; `optimizer_tensors` and `restore_optimizer` take
  the state of AdamW apart and put it back; `RunningAverage` follows a model.
Used by: features.finetuning.finetune_task, utils.training.memory_budget,
  utils.training.run.run_state, utils.training.run.step, utils.training.task
Design notes: the state in a checkpoint is numbered in the order of the groups, because names of
  parameters are the model's and an optimizer knows none. Learning rates and the like come from the
  settings and are not stored.
Assistant guidance: when extending: a change in the order of the groups makes old checkpoints
  unusable.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from warehouse.errors import StateError

__all__ = [
    "ParameterGroup",
    "RunningAverage",
    "make_optimizer",
    "optimizer_tensors",
    "parameter_groups",
    "restore_optimizer",
    "set_learning_rates",
]


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that are trained alike.

    Attributes
    ----------
    rate
        Share of the run's learning rate.
    start
        Optimizer step at which the group's own warm-up begins; 0 means that it has none.
    """

    parameters: Sequence[nn.Parameter]
    weight_decay: float
    rate: float = 1.0
    start: int = 0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[ParameterGroup]:
    """Return the groups that suit most models: matrices and kernels decay, biases and norms do not.

    Groups without parameters are left out.
    """
    parameters = list(model.parameters())
    groups = [
        ParameterGroup([one for one in parameters if one.ndim > 1], weight_decay),
        ParameterGroup([one for one in parameters if one.ndim <= 1], 0.0),
    ]
    return [group for group in groups if group.parameters]


def make_optimizer(groups: Sequence[ParameterGroup], lr: float) -> torch.optim.AdamW:
    """Return AdamW over the groups, which keep their `rate` and `start`."""
    options = [
        {
            "params": list(group.parameters),
            "weight_decay": group.weight_decay,
            "rate": group.rate,
            "start": group.start,
        }
        for group in groups
    ]
    return torch.optim.AdamW(options, lr=lr)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, lr: float, step: int, warmup_steps: int
) -> None:
    """Set the rate of every group for a step.

    Parameters
    ----------
    lr
        The run's rate at this step.
    warmup_steps
        Steps over which a group that starts later rises to its share of `lr`.
    """
    for group in optimizer.param_groups:
        risen = 1.0
        if group["start"]:
            risen = min(1.0, (step - group["start"] + 1) / (warmup_steps + 1))
        group["lr"] = lr * group["rate"] * max(0.0, risen)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as flat tensors, named "<parameter number>.<key>"."""
    return {
        f"{number}.{key}": value
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], where: Path
) -> None:
    """Put the tensors of `optimizer_tensors` back.

    Parameters
    ----------
    where
        The checkpoint, for the message.

    Raises
    ------
    StateError
        The tensors belong to other parameters.
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        position = int(number) if number.isdigit() else -1
        known = 0 <= position < len(parameters)
        # Scalars such as the step count have no shape to compare.
        if not known or (value.ndim and value.shape != parameters[position].shape):
            raise StateError(
                "the optimizer state in the checkpoint belongs to another model",
                where=where,
                found=name,
            )
        state.setdefault(position, {})[key] = value
    options = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": options})


class RunningAverage:
    """An exponential moving average of a model's weights.

    Parameters
    ----------
    model
        The model that is followed, on its device.
    decay
        Share of the former average that is kept at each step.
    copied
        Modules that are copied instead, with all that is in them.

    Attributes
    ----------
    model
        The average, in eval mode and without gradients.
    """

    def __init__(self, model: nn.Module, decay: float, copied: Collection[nn.Module] = ()) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.copied = tuple(
            f"{name}." for name, module in model.named_modules() if module in copied
        )

    def update(self, model: nn.Module, step: int) -> None:
        """Follow the model after optimizer step number `step`, counted from 0."""
        # A short memory at first: otherwise the average would be one of random weights.
        keep = min(self.decay, (1 + step) / (10 + step))
        fast = model.state_dict()
        with torch.no_grad():
            for name, slow in self.model.state_dict().items():
                if slow.is_floating_point() and not name.startswith(self.copied):
                    slow.lerp_(fast[name], 1 - keep)
                else:
                    slow.copy_(fast[name])
