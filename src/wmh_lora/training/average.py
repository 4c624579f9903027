"""Moving average of the trained weights, which validation and export use.

Running statistics of BatchNorm are averaged with them: those of the newest weights alone would not
fit the averaged ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["averaged_weights", "copy_state", "update_average"]

_STATISTICS = ("running_mean", "running_var")


def copy_state(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are trained and of running statistics, by name."""
    return {name: tensor.detach().clone() for name, tensor in _state(net).items()}


def _state(net: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {n: p for n, p in net.named_parameters() if p.requires_grad}
    state |= {name: b for name, b in net.named_buffers() if name.endswith(_STATISTICS)}
    return state


def update_average(
    average: Mapping[str, Tensor], net: nn.Module, steps_done: int, decay: float
) -> None:
    """Move the average towards the present weights, in place.

    The decay grows from 0 so that the initial weights are forgotten early in the run.
    """
    decay = min(decay, (1 + steps_done) / (10 + steps_done))
    state = _state(net)
    for name, mean in average.items():
        mean.lerp_(state[name].detach(), 1 - decay)


@contextmanager
def averaged_weights(net: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Network in evaluation mode, with averaged weights if there are any.

    Random numbers drawn meanwhile do not move torch's global generator.
    """
    own = copy_state(net) if average else {}
    state = _state(net)
    net.eval()
    try:
        with torch.no_grad():
            for name, mean in average.items():
                state[name].copy_(mean)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                state[name].copy_(value)
        net.train()
