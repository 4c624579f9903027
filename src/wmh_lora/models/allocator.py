"""How the process keeps the memory that a network's pass over a slice asks for and gives back."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_THRESHOLDS = (2**30, 2**25)  # bytes; older C libraries take 32 MB at the most


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep large freed blocks for the next request, in the whole process.

    By default glibc returns them to the system, which hands out each page again, zeroed, at its
    next use: for maps of tens of megabytes that come and go with every layer, this takes about as
    long as the work of some layers. In return, the process holds on to its largest use of memory.

    Returns
    -------
    bool
        Whether it is in effect: on Linux with glibc. Elsewhere nothing changes.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        any(mallopt(option, size) == 1 for size in _THRESHOLDS)
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD)
    )
