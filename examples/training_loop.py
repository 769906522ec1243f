"""python -m examples.training_loop artifacts/tensor_warehouse

Train a model of your own on a split, stop within an epoch, and resume with the next batch.
The model estimates how many boxes an image has, so the version needs images with boxes.
"""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor, nn

from utils.loader import ChunkLoader
from warehouse import Warehouse

EPOCHS = 2


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    # Images are stored as uint8, a quarter of the size of float32, so they are converted here.
    image = batch["image"].float() / 255
    # Unused box slots are padding: `box_mask` is True only where a slot holds a box.
    target = batch["box_mask"].sum(dim=1, keepdim=True).float()
    loss = nn.functional.smooth_l1_loss(model(image), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def main(path: str = "artifacts/tensor_warehouse") -> None:
    torch.manual_seed(0)
    train = Warehouse.open(path).split("train")
    features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    with ChunkLoader(train, batch_size=4, seed=1) as loader:
        half = len(loader) // 2
        for batch in itertools.islice(loader, half):
            step(model, optimizer, batch)
        # A few numbers that JSON can hold. In practice, save them beside the model and optimizer.
        state = loader.state_dict()

    # The engine and the number of workers do not affect the order, so both may change on resume.
    with ChunkLoader(train, batch_size=4, seed=1, engine="inline") as loader:
        loader.load_state_dict(state)
        for epoch in range(state["epoch"], EPOCHS):
            # Without this call every epoch would have the same order.
            loader.set_epoch(epoch)
            losses = [step(model, optimizer, batch) for batch in loader]
            print(
                f"epoch {epoch}: {len(losses)} batches, mean loss {sum(losses) / len(losses):.4f}"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
