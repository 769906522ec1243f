"""Encode images into features once, in small jobs, and train heads on them in seconds."""

__all__: list[str] = []
