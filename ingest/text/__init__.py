"""Text detection: annotation records, items and target maps."""

import importlib
import warnings

__all__: list[str] = []


def __getattr__(name: str) -> object:
    """Find `TextItems` where it was before this became a package, with a warning."""
    if name != "TextItems":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "ingest.text.TextItems has moved: import it from ingest.text.items instead. "
        "The old name goes with the next release.",
        DeprecationWarning,
        stacklevel=2,
    )
    return importlib.import_module("ingest.text.items").TextItems
