"""Bake once, read at the speed of LZ4: the store's public names.

`Warehouse` is imported when it is first asked for: the settings lie in this package too, and a
command that only prints its `--help` needs neither Zarr nor Arrow.
"""

from typing import TYPE_CHECKING

from warehouse.errors import WarehouseError

if TYPE_CHECKING:
    from warehouse.read.version import Warehouse

__all__ = ["Warehouse", "WarehouseError"]


def __getattr__(name: str) -> object:
    if name != "Warehouse":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from warehouse.read.version import Warehouse

    # Kept in the module, so that this function is called once.
    globals()[name] = Warehouse
    return Warehouse
