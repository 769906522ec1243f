"""Images too large for a canvas: windows of them, a survey of a folder, and patches."""

__all__: list[str] = []
