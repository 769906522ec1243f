"""Pictures to features once, in micro-jobs; heads on cached features in seconds."""

__all__: list[str] = []
