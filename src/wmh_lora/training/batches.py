"""Batches from a stream of samples, made by worker processes in a fixed order."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wmh_lora.training.settings import TrainingConfig

__all__ = ["Batch", "SampleLike", "StreamLike", "batch_loader"]


class SampleLike(Protocol):
    """One crop, as arrays."""

    @property
    def image(self) -> npt.NDArray[np.float32]:
        """(C, h, w) in [0, 1]."""

    @property
    def target(self) -> npt.NDArray[np.float32]:
        """(n, h, w) in [0, 1], one plane a structure."""

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(n,), whether each structure is labelled in this crop."""


class StreamLike(Protocol):
    """Endless stream of samples; item ``index`` depends on the index and a fixed seed alone."""

    def item(self, index: int) -> SampleLike:
        """Make sample number ``index``, from 0."""


class Batch(NamedTuple):
    """Crops of one forward pass: (B, C, h, w), (B, S, h, w) and (B, S)."""

    image: Tensor
    target: Tensor
    valid: Tensor


class _StreamSpan(Dataset[SampleLike]):
    """Samples ``start`` to ``stop`` of the stream, so that resuming meets the next one."""

    def __init__(self, stream: StreamLike, start: int, stop: int) -> None:
        self.stream, self.start, self.stop = stream, start, stop

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __getitem__(self, position: int) -> SampleLike:
        return self.stream.item(self.start + position)


def batch_loader(stream: StreamLike, config: TrainingConfig, start: int) -> DataLoader[Any]:
    """Batches of samples ``start``, ``start + 1``, ... in this order, without end in practice.

    The loader draws its seeds from a generator of its own: the global one serves dropout, and
    must meet the same calls in a resumed run as in an uninterrupted one.
    """
    stop = start + config.steps * config.samples_per_step
    return DataLoader(
        _StreamSpan(stream, start, stop),
        batch_size=config.batch_size,
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _collate(samples: Sequence[SampleLike]) -> Batch:
    def stack(name: str) -> Tensor:
        return torch.stack([torch.as_tensor(np.asarray(getattr(s, name))) for s in samples])

    return Batch(stack("image").float(), stack("target").float(), stack("valid").bool())


def _start_worker(worker: int) -> None:
    """One thread a worker; signals are for the main process, which ends the workers itself."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
