"""Folders of images by class, and of images with masks, and versions built from them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ingest.jobs import open_job
from ingest.rasters.settings import RasterSettings
from warehouse import Warehouse
from warehouse.settings import BuildSettings
from warehouse.write.publish import bake


def baked(source, output, **options):
    settings = BuildSettings(
        input_root=str(source), output_root=str(output), **{"target_size": (32, 32), **options}
    )
    output.mkdir()
    job = open_job(settings, RasterSettings())
    bake(job.plan, job.loader, output, workers=0, cluster=None, trace=False, on_plan=lambda _: None)
    return Warehouse.open(output)


def class_folders(root, names=("9", "10", "cat"), each=10):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for at in range(each):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(
                root / name / f"{at}.png"
            )


def masked(root, values=(0, 255), count=10, size=(40, 24)):
    rng = np.random.default_rng(1)
    for folder in ("image", "label"):
        (root / folder).mkdir(parents=True)
    for at in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(
            root / "image" / f"{at}.png"
        )
        Image.fromarray(rng.choice(np.array(values, np.uint8), (size[1], size[0]))).save(
            root / "label" / f"{at}.png"
        )
