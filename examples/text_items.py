"""python -m examples.text_items

Read images with text polygons (in ICDAR 2015's format) as training items for a text detector.
Give a folder of images with their `gt_<name>.txt` to use your own; otherwise a few are drawn.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ingest.text.items import TextItems
from utils.caching.cached_loader import CachedLoader
from utils.caching.tensor_cache import CachedDataset

WORDS = ("STORE", "EXIT", "OPEN", "###")


def draw(folder: Path) -> None:
    """One word on each image. The text ### marks a polygon that a detector should ignore."""
    font = ImageFont.load_default(size=40)
    for number, word in enumerate(WORDS):
        image = Image.new("RGB", (320, 160), (40 * number, 90, 120))
        canvas = ImageDraw.Draw(image)
        origin = (40 + 20 * number, 50)
        canvas.text(origin, word, fill="white", font=font)
        image.save(folder / f"{number}.png")

        left, top, right, bottom = map(round, canvas.textbbox(origin, word, font=font))
        corners = f"{left},{top},{right},{top},{right},{bottom},{left},{bottom}"
        (folder / f"gt_{number}.txt").write_text(f"{corners},{word}\n")


def show(folder: Path) -> None:
    items = TextItems(folder, Path(), size=(192, 320))
    # Decoding and drawing maps is deterministic. Random augmentation belongs behind the cache.
    cached = CachedDataset(items)

    # Images have different numbers of polygons, so a batch is a list of items and not a tensor.
    for batch in CachedLoader(cached, batch_size=2, collate_fn=list):
        for item in batch:
            share = item["probability"].mean()
            print(f"{item['source']}: {item['text']}, {item['ignore'].sum()} ignored", end=", ")
            print(f"{share:.1%} of its map {item['probability'].shape} is text")


def main(folder: str | None = None) -> None:
    if folder is not None:
        show(Path(folder))
        return
    with tempfile.TemporaryDirectory() as scratch:
        draw(Path(scratch))
        show(Path(scratch))


if __name__ == "__main__":
    main(*sys.argv[1:])
