"""A server's rows: `Store` is what a service drives; holdings, registry and transfer are its parts."""

from ps.store.core import Store, StoreLimits, StoreStatistics

__all__ = ["Store", "StoreLimits", "StoreStatistics"]
