"""python tests/support/recipe_builds.py CHECKOUT > tests/data/recipes_0_1.json

Builds one small version with each command that publishes versions and reads the recipes from
their manifests. The commands run as a user types them, so that nothing here depends on how the
code is arranged.

Sources are written byte by byte, without an image library: their fingerprints, and with them the
recipes, are the same on any machine. What still depends on the machine (versions of decoders,
weights, names of versions that a recipe refers to) is listed in `VARYING`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Runs commands one after another in one process: importing PyTorch takes longer than they do.
RUNNER = """
import json, runpy, sys
for name, *arguments in json.load(sys.stdin):
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(f"scripts.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise SystemExit(f"{name}: exit code {stop.code}")
"""

CODE_VERSION = "0.1.0"

# recipe: paths of what depends on the machine, as dotted keys.
VARYING: dict[str, tuple[str, ...]] = {
    "boxes": ("decoder",),
    "boxes_settings": ("decoder",),
    "masks": ("decoder",),
    "cube": ("decoder",),
    "features": ("encoder.weights_sha256", "source.version"),
    "patches": ("decoder",),
    "probabilities": ("model.weights", "source.version"),
    # WKT differs between releases of PROJ, and statistics may be rounded differently.
    "codes": (
        "checkpoint",
        "source.version",
        "source.digest",
        "source.cube.crs_wkt",
        "source.cube.features",
    ),
    "reconstruction": ("source.version", "source.digest"),
}


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 [H, W, 3] or [H, W] as a PNG whose deflate stream is one stored block.

    Compressed streams differ between releases of zlib; a stored one does not.
    """
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    assert len(raw) < 1 << 16

    stored = b"\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
    data = b"\x78\x01" + stored + struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def picture(number: int) -> np.ndarray:
    """Draw uint8 [64, 64, 3] from integers alone."""
    y, x, channel = np.ogrid[0:64, 0:64, 0:3]
    return ((3 * x + 5 * y + 40 * channel + 17 * number + x * y // 7) % 256).astype(np.uint8)


def write_boxes(root: Path) -> None:
    """Twelve pictures with Pascal VOC annotations of two classes, one or two boxes each."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for number in range(12):
        (root / "JPEGImages" / f"p{number:02d}.png").write_bytes(png(picture(number)))
        boxes = [(4 + number, 6, 30 + number, 40), (20, 10 + number, 60, 50)][: 1 + number % 2]
        objects = "".join(
            f"<object><name>{'cell' if at else 'seed'}</name><bndbox><xmin>{x1}</xmin>"
            f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for at, (x1, y1, x2, y2) in enumerate(boxes)
        )
        text = (
            f"<annotation><size><width>64</width><height>64</height></size>{objects}</annotation>"
        )
        (root / "Annotations" / f"p{number:02d}.xml").write_bytes(text.encode())


def write_masks(root: Path) -> None:
    """Ten pictures whose masks hold the values 0, 7 and 9."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    y, x = np.ogrid[0:64, 0:64]
    for number in range(10):
        inside = (x - 20 - number) ** 2 + (y - 30) ** 2 < 200
        mask = np.where(inside, 7, np.where(x + y > 100, 9, 0)).astype(np.uint8)
        (root / "images" / f"p{number:02d}.png").write_bytes(png(picture(number)))
        (root / "masks" / f"p{number:02d}.png").write_bytes(png(mask))


def write_rasters(root: Path) -> None:
    """Four dates of two bands as .npy files, a rectangle that says where they lie, and dates."""
    root.mkdir(parents=True)
    t, y, x = np.ogrid[0:4, 0:32, 0:32]
    red = (10 + (3 * x + 2 * y + 5 * t) % 90).astype(np.float32)
    nir = (40 + (x * y // 3 + 11 * t) % 160).astype(np.float32)
    np.save(root / "bands.npy", np.stack([red, nir], axis=-1))
    np.save(root / "cover.npy", ((x // 8 + y // 8) % 3 + 0 * t)[0].astype(np.float32))

    west, south, east, north = 500_000, 5_000_000, 500_320, 5_000_320
    corners = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    extent = {
        "type": "Polygon",
        "crs": {"type": "name", "properties": {"name": "EPSG:32633"}},
        "coordinates": [corners],
    }
    (root / "extent.geojson").write_text(json.dumps(extent))
    dates = ["2020-01-05", "2020-02-10", "2020-03-07", "2020-04-01"]
    (root / "dates.json").write_text(json.dumps(dates))


RASTER: dict[str, Any] = {
    "grid": {"geojson": "extent.geojson"},
    "time": {"file": "dates.json"},
    "features": [
        {"name": "red", "files": "bands.npy", "band": 1, "units": "DN"},
        {"name": "nir", "files": "bands.npy", "band": 2, "nodata": 40},
        {"name": "ndvi", "index": "ndvi", "red": "red", "nir": "nir"},
        {
            "name": "cover",
            "files": "cover.npy",
            "kind": "categorical",
            "codes": [0, 1, 2],
            "resampling": "mode",
            "static": True,
        },
    ],
    "chunk": {"time": 2, "y": 8, "x": 8},
    "shard": {"time": 4, "y": 16, "x": 16},
    "block": {"y": 8, "x": 8},
    "held_out_dates": 2,
    "empty_dates": "keep",
}


BOXES_SETTINGS: dict[str, Any] = {
    "target_size": [64, 64],
    "max_boxes": 4,
    "too_many_boxes": "truncate",
    "shard_samples": 4,
    "skip_empty": True,
    "missing_is_empty": True,
    "classes": ["seed", "cell"],
    "splits": {"train": 0.75, "val": 0.25},
    "seed": 3,
    "max_pixels": 10_000,
    "max_empty_ratio": 1.0,
}
MASKS_SETTINGS: dict[str, Any] = {
    "format": "masks",
    "mask_values": {"9": 2, "0": 0, "7": 1},
    "target_size": [48, 64],
    "resize_mode": "stretch",
    "pad_value": 0,
    "dtype": "float16",
    "compressor": "lz4hc",
    "group_pattern": None,
}
CUBE_SETTINGS: dict[str, Any] = {"format": "raster", "seed": 2, "compressor": "none"}
FEATURES: dict[str, Any] = {
    "encoder": "random:efficientnet_b0",
    "size": 32,
    "job_size": 6,
    "batch_size": 3,
    "picture_label": "commonest",
    "seed": 7,
}
SEGMENT: dict[str, Any] = {
    "mask_values": {"0": 0, "7": 1, "9": 1},
    "patch_size": 32,
    "overlap": 8,
    "job_size": 12,
    "width": 4,
    "levels": 1,
    "epochs": 1,
    "limit_batches": 1,
    "device": "cpu",
}
VQVAE: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "width": 8,
    "depth": 0,
    "codebook_size": 8,
    "code_dim": 2,
    "levels": 2,
    "stride": [1, 4, 4],
    "patch": [1, 4, 4],
    "limit_batches": 1,
    "device": "cpu",
}
COMPRESS: dict[str, Any] = {"levels": 1, "rate_weight": 0.5, "paths": 2, "shard_samples": 16}


def flags(section: str, work: Path, values: dict[str, Any], /, **folders: str) -> list[str]:
    """Return a section's settings as flags; `folders` are names of folders below `work`."""
    every = values | {key: str(work / name) for key, name in folders.items()}
    return [
        part
        for key, value in every.items()
        for part in (f"--{section}.{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def commands(work: Path) -> list[list[str]]:
    """Return every command, a script's name and its flags, in an order in which they can run."""

    def build(name: str, source: str, settings: dict[str, Any]) -> list[str]:
        values = settings | {"workers": 0}
        folders = {"input_root": source, "output_root": name}
        return ["build_zarr", *flags("build", work, values, **folders)]

    features = {"warehouse": "boxes_settings", "output_root": "features", "work": "jobs"}
    segment = {"input_root": "mask_sources", "output": "segment"}
    compress = {
        "warehouse": "cube",
        "checkpoint": "vqvae",
        "output_root": "codes",
        "reconstruct": "reconstruction",
    }
    return [
        build("boxes", "box_sources", {}),
        build("boxes_settings", "box_sources", BOXES_SETTINGS),
        build("masks", "mask_sources", MASKS_SETTINGS),
        build("cube", "raster_sources", CUBE_SETTINGS) + flags("raster", work, RASTER),
        ["extract_features", *flags("features", work, FEATURES, **features)],
        ["segment_patches", *flags("segment", work, SEGMENT, **segment)],
        ["train_vqvae", *flags("vqvae", work, VQVAE, warehouse="cube", output="vqvae")],
        ["compress_zarr", *flags("compress", work, COMPRESS, **compress)],
    ]


def build_recipes(checkout: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Build every version with the code of `checkout`; {name: {"version", "recipe"}}.

    Parameters
    ----------
    checkout : Path
        A working tree of the repository.
    work : Path
        An empty folder for sources and versions.
    """
    write_boxes(work / "box_sources")
    write_masks(work / "mask_sources")
    write_rasters(work / "raster_sources")

    environment = {key: value for key, value in os.environ.items() if "WAREHOUSE_" not in key}
    environment |= {
        "CODE_VERSION": CODE_VERSION,
        "OMP_NUM_THREADS": "1",
        "WAREHOUSE_EXPERIMENTS__DB": str(work / "experiments.db"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(commands(work)),
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"a command failed:\n{done.stderr[-4000:]}")

    roots = {name: work / name for name in VARYING}
    roots |= {name: work / "segment" / name for name in ("patches", "probabilities")}
    found = {}
    for name, root in roots.items():
        version = (root / "CURRENT").read_text().strip()
        manifest = json.loads((root / version / "manifest.json").read_text())
        found[name] = {"version": version, "recipe": manifest["recipe"]}
    return found


def name_of(recipe: dict[str, Any]) -> str:
    """Name a recipe as docs/format.md says: `v` and 12 hex digits of the sha256 of its JSON."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"v{hashlib.sha256(text.encode()).hexdigest()[:12]}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        built = build_recipes(Path(sys.argv[1]).resolve(), Path(folder))
    print(json.dumps(built, indent=1, sort_keys=True))  # noqa: T201
