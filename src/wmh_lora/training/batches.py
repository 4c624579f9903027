"""Batches from a stream of samples, made by worker processes in a fixed order."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wmh_lora.training.processes import Processes
from wmh_lora.training.settings import TrainingConfig

__all__ = ["Batch", "SampleLike", "StreamLike", "batch_loader"]


class SampleLike(Protocol):
    """One crop, as arrays.

    It may also have an attribute ``t1``: (T, h, w) in [0, 1], or None where T1 is missing.
    """

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
    """Crops of one forward pass.

    Attributes
    ----------
    image, target, valid
        (B, C, h, w), (B, S, h, w) and (B, S). Crops of unlike sizes are padded with background
        around them.
    t1, t1_present
        (B, T, h, w), zero where T1 is missing, and (B,) bool; None if no crop has T1.
    """

    image: Tensor
    target: Tensor
    valid: Tensor
    t1: Tensor | None = None
    t1_present: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Copy on another device."""
        image, target, valid, *t1 = (
            None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self
        )
        assert image is not None
        assert target is not None
        assert valid is not None
        return Batch(image, target, valid, *t1)


class _StreamItems(Dataset[SampleLike]):
    def __init__(self, stream: StreamLike) -> None:
        self.stream = stream

    def __getitem__(self, index: int) -> SampleLike:
        return self.stream.item(index)


class _MicroBatches:
    """Sample numbers of the micro-batches that one process computes."""

    def __init__(self, config: TrainingConfig, start: int, processes: Processes) -> None:
        self.config, self.start, self.processes = config, start, processes

    def __iter__(self) -> Iterator[list[int]]:
        size, count = self.config.batch_size, self.processes.count
        for step in range(self.config.steps):
            for part in range(self.processes.rank, self.config.accumulation, count):
                first = self.start + step * self.config.samples_per_step + part * size
                yield list(range(first, first + size))


def batch_loader(
    stream: StreamLike, config: TrainingConfig, start: int, processes: Processes | None = None
) -> DataLoader[Any]:
    """Micro-batches of samples ``start``, ``start + 1``, ... in this order, to the last step.

    Of several processes, each gets its own: micro-batch ``i`` of a step goes to process ``i``
    modulo their number. The loader draws its seeds from a generator of its own, not the global one.
    """
    processes = processes or Processes()
    return DataLoader(
        _StreamItems(stream),
        batch_sampler=_MicroBatches(config, start, processes),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(config.seed),
        pin_memory=processes.device.type == "cuda",
    )


def _collate(samples: Sequence[SampleLike]) -> Batch:
    size = tuple(max(s.image.shape[axis] for s in samples) for axis in (-2, -1))

    def stack(name: str) -> Tensor:
        return torch.stack([_padded(getattr(sample, name), size) for sample in samples])

    valid = torch.stack([torch.as_tensor(np.asarray(sample.valid)) for sample in samples])
    planes = [getattr(sample, "t1", None) for sample in samples]
    t1 = _collate_t1([None if p is None else _padded(p, size) for p in planes])
    return Batch(stack("image"), stack("target"), valid.bool(), *t1)


def _padded(planes: npt.NDArray[np.float32], size: tuple[int, ...]) -> Tensor:
    """Planes (n, h, w) in the middle of planes of ``size``, zero around them."""
    tensor = torch.as_tensor(np.asarray(planes)).float()
    rows, columns = (whole - length for whole, length in zip(size, tensor.shape[1:], strict=True))
    if not rows and not columns:
        return tensor
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return torch.nn.functional.pad(tensor, around)


def _collate_t1(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """T1 of every crop, zero where it is missing, and where it is there."""
    some = next((tensor for tensor in tensors if tensor is not None), None)
    if some is None:
        return None, None
    stacked = torch.stack([torch.zeros_like(some) if t is None else t for t in tensors])
    return stacked, torch.tensor([t is not None for t in tensors])


def _start_worker(worker: int) -> None:
    """One thread a worker; signals are for the main process, which ends the workers itself."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
