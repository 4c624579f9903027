"""What the optimiser sees of the network: parameters by kind, with their rates and decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wmh_lora.training.checkpoint import Checkpoint
from wmh_lora.training.settings import TrainingConfig

__all__ = ["freeze_rateless", "parameter_groups", "with_current_settings"]


def _kind(name: str) -> str:
    """``lora``, ``adapter``, ``decoder`` or ``encoder``: what a parameter belongs to."""
    return "lora" if "lora_" in name else name.partition(".")[0]


def _peak_rates(config: TrainingConfig) -> dict[str, float]:
    return {
        "lora": config.lora_lr,
        "adapter": config.adapter_lr,
        "decoder": config.decoder_lr,
        "encoder": config.encoder_lr,
    }


def freeze_rateless(net: nn.Module, config: TrainingConfig) -> None:
    """Take the gradient from every kind of parameter whose learning rate is 0.

    Nothing is then computed for it: without the channel adapter's, the backward pass ends at the
    first LoRA layer.
    """
    rates = _peak_rates(config)
    for name, parameter in net.named_parameters():
        if rates[_kind(name)] == 0:
            parameter.requires_grad_(False)


def parameter_groups(net: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Trained parameters by kind, each kind as two groups: with and without weight decay.

    Kinds are ``lora``, ``adapter``, ``decoder`` and, if it is trained in full, ``encoder``.
    Vectors and scalars (biases, norms) are not decayed.
    """
    peaks = _peak_rates(config)
    kinds: dict[str, tuple[list[Tensor], list[Tensor]]] = {kind: ([], []) for kind in peaks}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            kinds[_kind(name)][parameter.ndim < 2].append(parameter)
    if not any(kinds["encoder"]):
        del kinds["encoder"]  # as in checkpoints of runs with a frozen encoder
    groups: list[dict[str, Any]] = []
    for kind, (decayed, plain) in kinds.items():
        common = {"name": kind, "peak_lr": peaks[kind], "lr": peaks[kind]}
        groups.append({"params": decayed, "weight_decay": config.weight_decay, **common})
        groups.append({"params": plain, "weight_decay": 0.0, **common})
    return groups


def with_current_settings(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Saved moments with the learning rates and decay of the present configuration."""
    state = dict(checkpoint.optimizer)
    changeable = ("peak_lr", "weight_decay", "betas")
    state["param_groups"] = [
        {**saved, **{key: present[key] for key in changeable}}
        for saved, present in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return state
