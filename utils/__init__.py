"""Between the store and a training step: samplers, loader, caches, the training loop, run logs.

Modules that moved can be imported by their old names until the next release, with a warning.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__: list[str] = []

MOVED = {
    "utils.tensor_cache": "utils.caching.tensor_cache",
    "utils.cached_loader": "utils.caching.cached_loader",
    "utils.experiments": "utils.tracking.experiments",
}


class _MovedModules(MetaPathFinder, Loader):
    """Import a moved module by its old name, with a warning; its objects are the same."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new_name = MOVED[module.__name__]
        # Python does not count its own import frames, so the warning names the importing line.
        warnings.warn(
            f"{module.__name__} has moved: import from {new_name} instead. "
            "The old name will be removed in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        moved = importlib.import_module(new_name)
        module.__doc__ = moved.__doc__
        vars(module).update({name: getattr(moved, name) for name in moved.__all__})


# At the end of the path: a real module of that name, should there be one again, is found first.
sys.meta_path.append(_MovedModules())
