"""Encoders: networks that turn images into features, and how each kind of name is opened."""

__all__: list[str] = []
