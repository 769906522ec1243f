"""The rate-distortion report."""

__all__: list[str] = []
