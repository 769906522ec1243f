"""Looking at versions: summaries, verification, reports."""

__all__: list[str] = []
