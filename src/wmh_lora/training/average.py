"""Moving average of the trained weights, which validation and export use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["averaged_weights", "copy_parameters", "update_average"]


def copy_parameters(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are trained, by name."""
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


def update_average(
    average: Mapping[str, Tensor], net: nn.Module, steps_done: int, decay: float
) -> None:
    """Move the average towards the present weights, in place.

    The decay grows from 0 so that the initial weights are forgotten early in the run.
    """
    decay = min(decay, (1 + steps_done) / (10 + steps_done))
    parameters = dict(net.named_parameters())
    for name, mean in average.items():
        mean.lerp_(parameters[name].detach(), 1 - decay)


@contextmanager
def averaged_weights(net: nn.Module, average: Mapping[str, Tensor]) -> Iterator[None]:
    """Network in evaluation mode, with averaged weights if there are any.

    Random numbers drawn meanwhile do not move torch's global generator.
    """
    own = copy_parameters(net) if average else {}
    parameters = dict(net.named_parameters())
    net.eval()
    try:
        with torch.no_grad():
            for name, mean in average.items():
                parameters[name].copy_(mean)
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for name, value in own.items():
                parameters[name].copy_(value)
        net.train()
