"""Matrices that grow without copying: virtual memory reserved once, pages taken as they are first written.

A reservation costs address space only (MAP_NORESERVE: the kernel keeps no swap for it); freed pages go back with
MADV_DONTNEED, or MADV_REMOVE where other processes may map the memory (ps/shared.py). Huge pages make random gathers
1.6 to 1.9 times faster: with pages of 4 KiB nearly every row misses the TLB. They are asked for by `madvise`, which
works where transparent huge pages are set to `madvise` or `always` (for shared memory, to `advise`), and does nothing
elsewhere.
"""

import contextlib
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ps.errors import RequestError

_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 has no name for it
_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)
_DONTNEED = getattr(mmap, "MADV_DONTNEED", None)
_REMOVE = getattr(mmap, "MADV_REMOVE", None)
HUGE_PAGE = 2**21


class Reservation:
    """A zeroed C-contiguous array over reserved memory. `array` keeps it alive; there is nothing to close.

    fd: of the anonymous file behind a shared one, for other processes to map; -1 for a private one.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, huge: bool = True, shared: bool = False) -> None:
        """Reserve; raises RequestError, naming the size, where the system grants no address space."""
        count = int(np.prod(shape, dtype=object))
        size = max(count * np.dtype(dtype).itemsize, mmap.PAGESIZE)
        self.fd = -1
        try:
            if shared:
                self.fd = os.memfd_create("embring")
                weakref.finalize(self, os.close, self.fd)
                os.ftruncate(self.fd, size)
                self._map = mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED | _NORESERVE)
            else:
                self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        except (OSError, ValueError, OverflowError) as error:
            raise RequestError(
                f"cannot reserve {size} bytes of address space ({error}); vm.overcommit_memory must not be 2, "
                "nor `ulimit -v` be set"
            ) from None
        self._free = _REMOVE if shared else _DONTNEED
        if huge and _HUGEPAGE is not None and size >= HUGE_PAGE:
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                self._map.madvise(_HUGEPAGE)
        self.array: NDArray[Any] = np.frombuffer(self._map, dtype, count).reshape(shape)

    def release(self, start: int, stop: int) -> None:
        """Give the whole pages within bytes [start, stop) back to the system; they read as zeros from then on."""
        low = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        high = min(stop, len(self._map)) // mmap.PAGESIZE * mmap.PAGESIZE
        if high > low and self._free is not None:
            self._map.madvise(self._free, low, high - low)


def reserve(shape: tuple[int, ...], dtype: DTypeLike, huge: bool = True) -> NDArray[Any]:
    """The array of a `Reservation` that never gives memory back."""
    return Reservation(shape, dtype, huge).array


def physical_memory() -> int:
    """Bytes that this process may use: the machine's memory, or its control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(name).read_text()))
    return total
