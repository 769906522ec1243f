"""A toy encoder of three blocks, pictures whose stripes tell their class, and a fine-tuning run on
them, all in memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from features.encoders.network import NetworkEncoder, he_init
from features.finetuning.finetune_task import FinetuneTask
from features.finetuning.settings import FinetuneTraining
from utils.samplers import ChunkBatchSampler
from utils.training.backbone import Backbone
from utils.training.loop import Trainer
from utils.training.memory_budget import MemoryBudget
from utils.training.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
COUNTS = {"train": 36, "val": 12, "test": 12}
CLASSES = 3
TARGETS = {name: torch.arange(count) % CLASSES for name, count in COUNTS.items()}


class Toy(nn.Module):
    """[B, 3, H, W] -> [B, width, H/2, W/2].

    A stem, three blocks with batch norms, and a convolution after them.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Dropout(0.5),
            )
            for _ in range(3)
        )
        self.top = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        said: Tensor = self.top(x)
        return said


def toy_trunk(recipe: dict[str, Any]) -> Backbone:
    network = Toy(int(recipe["width"]))
    return Backbone("toy", network, list(network.blocks), (0.5,) * 3, (0.5,) * 3, recipe)


OURS = {"toy": toy_trunk}


def toy_encoder(
    width: int = 8, *, size: int = 16, random: bool = False, seed: int = 0
) -> NetworkEncoder:
    about = toy_trunk({"kind": "toy", "width": width})
    he_init(about.network, seed)
    return NetworkEncoder(
        "toy",
        about.network,
        about.blocks,
        size=(size, size),
        random=random,
        mean=about.mean,
        std=about.std,
        recipe=about.recipe,
    )


def pictures(name: str, size: int = 16) -> Tensor:
    """uint8 [n, 3, size, size]: stripes of period 2, 4 or 8 with noise."""
    rng = np.random.default_rng([len(name), size])
    at = np.arange(size)
    rows = [
        120 * ((at // 2 ** int(target)) % 2)[None, :, None] + rng.integers(0, 100, (3, size, size))
        for target in TARGETS[name]
    ]
    return torch.from_numpy(np.stack(rows).astype(np.uint8))


class FakeLoader:
    """The ChunkLoader contract over `pictures`, in a real sampler's order."""

    def __init__(self, name: str, batch_size: int = 4, size: int = 16) -> None:
        self.pictures = pictures(name, size)
        self.sampler = ChunkBatchSampler(
            [COUNTS[name]], batch_size, shuffle=name == "train", seed=3
        )
        self.set_epoch, self.state_dict, self.load_state_dict = (
            getattr(self.sampler, key) for key in ("set_epoch", "state_dict", "load_state_dict")
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        for indices in self.sampler:
            yield {"image": self.pictures[indices], "index": torch.from_numpy(np.asarray(indices))}


class Quick(FinetuneTask):
    """Without pictures, which take longer than the training.

    `on_loss(call)` is told before each batch's loss.
    """

    calls = 0

    def on_loss(self, call: int) -> None:
        pass

    def loss(self, model, batch, epoch):
        self.on_loss(self.calls)
        self.calls += 1
        return super().loss(model, batch, epoch)

    def draw(self, history, path):
        pass

    def draw_matrix(self, matrix, name):
        pass


def settings(**changes: Any) -> FinetuneTraining:
    small = {
        "epochs": 3,
        "head_epochs": 1,
        "batch_size": 4,
        "accumulate": 2,
        "warmup_steps": 2,
        "lr": 0.02,
        "device": "cpu",
        "blocks": 2,
        "backbone_rate": 0.5,
        "resume": True,
    }
    return FinetuneTraining(**small | changes)


def make_task(
    folder: Path,
    kind: type[FinetuneTask] = Quick,
    encoder: NetworkEncoder | None = None,
    size: int = 16,
    *,
    save_memory: bool = False,
    **changes: Any,
) -> FinetuneTask:
    chosen = settings(**changes)
    steps = -(-len(FakeLoader("train", chosen.batch_size, size)) // chosen.accumulate)
    return kind(
        chosen,
        encoder or toy_encoder(size=size),
        "abc",
        (TARGETS["train"], TARGETS["val"]),
        steps=steps,
        folder=folder,
        final=("test", FakeLoader("test", 4, size), TARGETS["test"]),
        save_memory=save_memory,
    )


def make_trainer(
    folder: Path,
    task: FinetuneTask | None = None,
    size: int = 16,
    budget: MemoryBudget | None = None,
    **changes: Any,
) -> Trainer:
    task = task or make_task(folder, size=size, **changes)
    chosen = settings(**changes)
    loaders = FakeLoader("train", chosen.batch_size, size), FakeLoader("val", 4, size)
    return Trainer(
        task, chosen, *loaders, folder / "training", ranks=ALONE, budget=budget, save_steps=2
    )


def told(folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Lines of the log without what differs from run to run."""
    lines = [
        json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()
    ]
    return [
        {key: value for key, value in line.items() if not key.startswith("t_") and key != "seconds"}
        for line in lines
        if line["kind"] == kind
    ]
