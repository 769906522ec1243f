"""The network: features as channels, layers, the model, and its start from principal components."""

__all__: list[str] = []
