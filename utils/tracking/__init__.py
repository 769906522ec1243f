"""The run log and the experiment log."""

__all__: list[str] = []
