"""The vector-quantised autoencoder of raster cubes.

Blocks (time, y, x, feature) to integer codes and back.
"""

__all__: list[str] = []
