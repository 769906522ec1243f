"""A cube as codes, and back."""

__all__: list[str] = []
