"""python -m examples.own_augmentation artifacts/tensor_warehouse

Mirror half of the images vertically and change their brightness, with boxes that follow the image.
A version of uint8 images with boxes is required.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from utils.augment import uniform
from utils.loader import ChunkLoader
from warehouse import Warehouse

# `utils.augment` uses the numbers below 100. Another number gives draws independent of its draws.
MIRROR, BRIGHTNESS = 100, 101


def mirror_and_brighten(batch: dict[str, Tensor], *, seed: int, epoch: int) -> dict[str, Tensor]:
    # Draws follow from (seed, epoch, sample index), not from a generator with a state. A sample
    # therefore looks the same for any number of workers, any batch size, and after a resume.
    index = batch["index"].numpy()
    mirrored = torch.from_numpy(uniform(seed, epoch, index, MIRROR) < 0.5)
    factor = torch.from_numpy(0.8 + 0.4 * uniform(seed, epoch, index, BRIGHTNESS)).float()

    # Every operation makes a new tensor. The loader's own buffers must not be written to.
    image = batch["image"].float() / 255
    image = torch.where(mirrored[:, None, None, None], image.flip(2), image)
    image = (image * factor[:, None, None, None]).clamp(0, 1)

    # Boxes are (x1, y1, x2, y2) in [0, 1]. After mirroring, the lower edge is the upper one.
    x1, y1, x2, y2 = batch["box"].unbind(dim=-1)
    flipped = torch.stack([x1, 1 - y2, x2, 1 - y1], dim=-1)

    # Unused slots are zeros and must stay zeros.
    moved = mirrored[:, None] & batch["box_mask"]
    box = torch.where(moved[..., None], flipped, batch["box"])
    return {**batch, "image": image, "box": box}


def main(path: str = "artifacts/tensor_warehouse") -> None:
    train = Warehouse.open(path).split("train")
    # `letterbox` maps boxes back to the source file, which is wrong once an image was mirrored.
    names = ["image", "box", "box_mask", "label"]

    with ChunkLoader(train, 4, arrays=names, seed=1, augment=mirror_and_brighten) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                for position in (batch["index"] == 0).nonzero().flatten().tolist():
                    mean = batch["image"][position].mean()
                    print(f"epoch {epoch}: sample 0 has a mean brightness of {mean:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
