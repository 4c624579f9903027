"""What a process that trains asks of the libraries under it, before they are loaded."""

from __future__ import annotations

import os

from wmh_lora.models.allocator import keep_freed_memory

__all__ = ["prepare_for_training"]


def prepare_for_training() -> None:
    """Set how threads wait and what becomes of freed memory; call it before torch is imported."""
    # Threads that spin while they wait take the processor from those that they wait for: measured
    # 4 times slower beside one other busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # NumPy's products are made by the workers that draw samples, which get one core each.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    keep_freed_memory()
