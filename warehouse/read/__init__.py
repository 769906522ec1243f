"""Readers of published versions."""

__all__: list[str] = []
