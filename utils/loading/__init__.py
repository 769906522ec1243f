"""Engines, the choice of a store, and copies to a device."""

__all__: list[str] = []
