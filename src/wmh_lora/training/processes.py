"""One process or several, that together do what one would: the same steps on the same samples.

Several are started by ``accelerate launch``; see `Processes.launched`. An optimiser step consists
of micro-batches that are numbered over all processes; process ``r`` of ``n`` takes every ``n``-th,
from ``r``. Gradients are added up once a step and divided by the number of micro-batches, so each
process takes the same step. BatchNorm's running statistics become those that one process would
have, see `RunningStatistics`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Processes", "RunningStatistics"]

# Other processes wait while the first one validates on whole scans.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Processes:
    """One process among those that train together; by default the only one, on the CPU.

    Attributes
    ----------
    rank, count
        Number of this process, from 0, and how many there are.
    device
        Where this process computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def launched(cls, device: Literal["auto", "cpu"] = "auto") -> Processes:
        """Find out how this process was started.

        ``accelerate launch`` (or ``torchrun``) says so in the environment; without it this process
        is the only one.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # takes a second to import, and has no types
            from accelerate import PartialState  # type: ignore[import-untyped]

            state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
            return cls(state.process_index, state.num_processes, state.device)
        if device == "auto" and torch.cuda.is_available():
            return cls(device=torch.device("cuda"))
        if device == "auto" and torch.backends.mps.is_available():
            return cls(device=torch.device("mps"))
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors by their sums over all processes, in place and in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1).to(self.device) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; a meeting point, too."""
        total = torch.tensor([float(flag)])
        self.sum([total])
        return bool(total > 0)

    def sum_gradients(self, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Add up gradients, together with other tensors.

        A parameter without gradient in every process stays without: the optimiser skips it.
        """
        if self.count == 1:
            return
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.sum([*gradients, has, *others])
        for parameter, count in zip(parameters, has.tolist(), strict=True):
            if not count:
                parameter.grad = None


class RunningStatistics:
    """BatchNorm's running statistics over the micro-batches of a step, whoever computes them.

    One process updates them in the order of the micro-batches, ``r <- (1 - m) r + m s``. From the
    value ``r`` at the start of the step, the result is ``r + sum (1 - m)^k d`` with the change
    ``d = m (s - r)`` of each micro-batch alone and the number ``k`` of those after it. So each
    process adds up its own changes, and the sum over the processes is exactly that of one.

    Parameters
    ----------
    net
        In training mode; layers that do not update their statistics are left alone.
    """

    def __init__(self, net: nn.Module) -> None:
        layers = [
            layer
            for layer in net.modules()
            if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
        ]
        self._counters = [c for layer in layers if (c := layer.num_batches_tracked) is not None]
        self._kept: list[tuple[Tensor, float]] = []
        for layer in layers:
            for values in (layer.running_mean, layer.running_var):
                if values is not None and layer.momentum is not None:
                    self._kept.append((values, 1 - layer.momentum))
        self._start = [values.clone() for values, _ in self._kept]
        self._counts = [counter.clone() for counter in self._counters]
        self.changes = [torch.zeros_like(values) for values, _ in self._kept]

    def undo(self) -> None:
        """Make them what they were at the start of the step."""
        for (values, _), start in zip(self._kept, self._start, strict=True):
            values.copy_(start)
        for counter, before in zip(self._counters, self._counts, strict=True):
            counter.copy_(before)

    def collect(self, later: int) -> None:
        """Note the change by one micro-batch, ``later`` before the last, and take it back."""
        for (values, keep), start, change in zip(
            self._kept, self._start, self.changes, strict=True
        ):
            change.add_(values - start, alpha=keep**later)
            values.copy_(start)

    def finish(self, micro_batches: int) -> None:
        """Apply ``changes``, which meanwhile are the sums over all processes."""
        for (values, _), start, change in zip(self._kept, self._start, self.changes, strict=True):
            values.copy_(start + change)
        for counter, before in zip(self._counters, self._counts, strict=True):
            counter.copy_(before + micro_batches)
