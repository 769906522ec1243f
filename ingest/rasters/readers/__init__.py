"""Raster files of every kind as windows of float32, NaN where nothing was measured."""
