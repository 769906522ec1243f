"""Images: headers, decoding, letterboxing, boxes, masks, and the plan of a version of images."""

__all__: list[str] = []
