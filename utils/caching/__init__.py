"""Finished tensors kept in RAM."""

__all__: list[str] = []
