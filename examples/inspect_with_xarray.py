"""python -m examples.inspect_with_xarray artifacts/tensor_warehouse train sample.png

Inspect a version with xarray alone: no PyTorch and none of this project's code.
For a raster cube, give `cube` instead of the name of a split.
"""

from __future__ import annotations

import sys
from pathlib import Path

import xarray


def version_folder(path: Path) -> Path:
    # A root holds several versions, and the file CURRENT names the one that was built last.
    current = path / "CURRENT"
    return path / current.read_text().strip() if current.is_file() else path


def main(
    path: str = "artifacts/tensor_warehouse", group: str = "train", picture: str = "sample.png"
) -> None:
    store = version_folder(Path(path)) / "warehouse.zarr"
    # Nothing is decoded here: xarray reads the metadata, and Dask the chunks that are asked for.
    dataset = xarray.open_zarr(store, group=group, consolidated=False)

    print("dimensions: ", dict(dataset.sizes))
    print("coordinates:", list(dataset.coords))
    for name, array in dataset.data_vars.items():
        print(f"{name}: {array.dtype} {array.dims}")

    if "image" not in dataset:
        return

    # One inner chunk is one image, so a few of them cost little even in a version of terabytes.
    # xarray applies `scale_factor`, which turns uint8 into numbers in [0, 1].
    image = dataset["image"].isel(sample=slice(0, 16))
    mean = image.mean(("sample", "y", "x")).values.round(3)
    print(f"mean of each channel over {image.sizes['sample']} images: {mean.tolist()}")

    axes = image[0].plot.imshow(rgb="channel", yincrease=False)
    axes.figure.savefig(picture)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:])
