"""Baking and publishing versions."""

__all__: list[str] = []
