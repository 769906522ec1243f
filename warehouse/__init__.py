"""Bake once, read at the speed of LZ4: the store's public names."""

from warehouse.errors import WarehouseError
from warehouse.read.version import Warehouse

__all__ = ["Warehouse", "WarehouseError"]
