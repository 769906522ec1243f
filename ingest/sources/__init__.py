"""What lies below the input root: files, their hashes, how they pair, and their splits."""

__all__: list[str] = []
