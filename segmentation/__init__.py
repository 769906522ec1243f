"""Semantic segmentation of large images: patches, a U-Net, and masks stitched from predictions."""

__all__: list[str] = []
