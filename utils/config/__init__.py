"""Parts of `utils.argyaml`: the layers of settings, and how they become frozen models."""

__all__: list[str] = []
