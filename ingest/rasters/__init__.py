"""Raster sources: their grids, stacking them over time, and the plan of a cube."""

__all__: list[str] = []
