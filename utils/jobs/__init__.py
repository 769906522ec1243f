"""Resumable micro-jobs: a queue, running, publishing, rows."""

__all__: list[str] = []
