"""Text detection: annotation records, items and target maps."""

__all__: list[str] = []
