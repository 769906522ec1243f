"""Generated samples: images with boxes, classes or masks, and a landscape over time."""

__all__: list[str] = []
