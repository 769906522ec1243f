"""The training loop, tasks, checkpoints, ranks and memory."""

__all__: list[str] = []
