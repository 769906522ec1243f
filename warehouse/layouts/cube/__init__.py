"""The layout of cubes, and what it takes beside the files that all layouts share."""

__all__: list[str] = []
