"""Vector quantizers: residual codebooks learned by EMA, and finite scalar quantization."""

__all__: list[str] = []
