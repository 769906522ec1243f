"""python -m benchmarks.raw_pixels WAREHOUSE ... : what a classifier gets from the pixels alone,
which trained features have to beat.

Pictures become grey (luma), 24 x 24 (area filter), in [0, 1]; a multinomial logistic regression
with an L2 penalty is fitted on the train split by L-BFGS to its optimum. `C` is scikit-learn's: C x
the summed log loss + half the squared weights, biases free. The C with the best accuracy on val is
taken (the smallest of equals), and the test split only tells. Beside it stands C = 1,
scikit-learn's default.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from warehouse import Warehouse

__all__ = ["fit_logistic", "grey_pixels", "measure_raw_pixels"]

SIDE = 24
LUMA = (0.299, 0.587, 0.114)
PENALTIES = (0.01, 0.1, 1.0, 10.0)


def grey_pixels(
    warehouse: Warehouse, name: str, side: int = SIDE
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return pixels, float64 [n, side * side] in [0, 1], and classes, int64 [n], of a split."""
    split = warehouse.split(name)
    image = torch.from_numpy(split.array("image")[:]).double() / 255
    grey = (image * torch.tensor(LUMA, dtype=torch.float64).view(1, 3, 1, 1)).sum(
        dim=1, keepdim=True
    )
    small = functional.adaptive_avg_pool2d(grey, side)
    return small.flatten(1).numpy(), split.array("target")[:].astype(np.int64)


def fit_logistic(
    rows: NDArray[np.float64], target: NDArray[np.int64], classes: int, penalty: float
) -> tuple[Any, Any]:
    """(weights [classes, D], bias [classes]) minimising penalty * sum of log loss + |weights|^2 /
    2. penalty: scikit-learn's C.
    """
    x, y = torch.from_numpy(rows), torch.from_numpy(target)
    weights = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias],
        max_iter=2000,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(
            x @ weights.T + bias, y, reduction="sum"
        ) + weights.square().sum() / (2 * penalty)
        torch.autograd.backward(loss)
        return loss

    # The stubs of PyTorch leave the decorated `LBFGS.step` without types.
    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach().numpy(), bias.detach().numpy()


def measure_raw_pixels(warehouse: Warehouse) -> dict[str, Any]:
    """Accuracies on the test split, of the C chosen on val and of C = 1."""
    classes = len(warehouse.manifest.class_names)
    splits = {name: grey_pixels(warehouse, name) for name in ("train", "val", "test")}
    scores = {}
    for penalty in PENALTIES:
        weights, bias = fit_logistic(*splits["train"], classes, penalty)
        scores[penalty] = {
            name: float(((rows @ weights.T + bias).argmax(axis=1) == target).mean())
            for name, (rows, target) in splits.items()
        }
    chosen = max(PENALTIES, key=lambda penalty: (scores[penalty]["val"], -penalty))
    return {
        "version": warehouse.version,
        "C": chosen,
        "accuracy": scores[chosen]["test"],
        "accuracy_C1": scores[1.0]["test"],
        "test": len(splits["test"][1]),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "warehouse", nargs="+", help="a warehouse of class folders with train, val and test"
    )
    rows = [
        measure_raw_pixels(Warehouse.open(path)) for path in parser.parse_args(arguments).warehouse
    ]
    for row in rows:
        print(json.dumps(row))
    for key in ("accuracy", "accuracy_C1"):
        values = np.array([row[key] for row in rows])
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
        print(
            f"{key}: {values.mean():.3f} +- {error:.3f} (standard error over "
            f"{len(values)} warehouses)"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
