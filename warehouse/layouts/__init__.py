"""What each kind of version consists of."""

__all__: list[str] = []
