"""Classification heads on cached features: data, models, training and scoring."""

__all__: list[str] = []
