"""Fine-tuning an encoder within a budget of memory and time."""

__all__: list[str] = []
