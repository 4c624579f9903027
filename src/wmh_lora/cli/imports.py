"""Imports of large packages, a fifth faster."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["without_collection"]


@contextmanager
def without_collection() -> Iterator[None]:
    """Look for no garbage while modules are imported, nor among what they leave behind afterwards.

    An import of torch makes some 300,000 objects, all of which stay; Python would go through them
    again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
