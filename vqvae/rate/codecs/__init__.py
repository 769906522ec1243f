"""The codecs that a rate-distortion report compares with."""

__all__: list[str] = []
