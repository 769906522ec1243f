"""The parts of a training run: where it stands, its steps, and when it ends."""

__all__: list[str] = []
