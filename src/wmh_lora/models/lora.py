"""Low-rank adaptation (LoRA) of the frozen encoder: attach, extract, merge, count.

LoRA [1]_ adds ``alpha / rank * B @ A`` to the weight of a frozen linear layer, with ``A`` of shape
(rank, in) and ``B`` of shape (out, rank). Training attaches the adapters with the `peft` library;
inference adds the product into the weights itself and imports no `peft`. Between the two, adapters
travel as tensors named ``<module>.lora_a`` and ``<module>.lora_b``.

References
----------
.. [1] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wmh_lora.errors import AdapterMismatchError, ConfigError

__all__ = [
    "add_lora",
    "check_tensors",
    "extract_lora",
    "load_lora_into_peft",
    "lora_shapes",
    "merge_lora",
    "parameter_budget",
]

_PEFT_ADAPTER = "default"  # peft's own name for an unnamed adapter
_SHOWN = 3  # differing keys that an error message lists


def _target_linears(encoder: nn.Module, targets: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of each linear layer whose own name is in ``targets``.

    Under `peft` the layer is its wrapper, which offers ``in_features`` and ``out_features`` too.
    """
    for name, module in encoder.named_modules():
        is_linear = isinstance(module, nn.Linear) or hasattr(module, "lora_A")
        if is_linear and name.rpartition(".")[2] in targets:
            yield name, module


def lora_shapes(
    encoder: nn.Module, rank: int, targets: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter tensor that fits ``encoder``.

    Raises
    ------
    ConfigError
        If one of ``targets`` names no linear layer of the encoder.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    found = set()
    for name, layer in _target_linears(encoder, targets):
        found.add(name.rpartition(".")[2])
        shapes[f"{name}.lora_a"] = (rank, layer.in_features)
        shapes[f"{name}.lora_b"] = (layer.out_features, rank)
    absent = sorted(set(targets) - found)
    if absent:
        raise ConfigError(
            f"No linear layer of the encoder is named {', '.join(map(repr, absent))}; "
            f"correct the setting 'lora_targets'."
        )
    return shapes


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Compare names and shapes exactly.

    Raises
    ------
    AdapterMismatchError
        Naming the first tensors that are missing, unexpected or of another shape.
    """
    problems = []
    for label, names in (
        ("missing", sorted(set(expected) - set(tensors))),
        ("unexpected", sorted(set(tensors) - set(expected))),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{label}: {', '.join(names[:_SHOWN])}{more}")
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        problems.append(f"other shape: {', '.join(wrong[:_SHOWN])}{more}")
    if problems:
        raise AdapterMismatchError(f"The tensors do not fit {what} ({'; '.join(problems)}).")


# --- training (peft) ------------------------------------------------------------------------


def add_lora(
    encoder: nn.Module, rank: int, alpha: int, dropout: float, targets: Collection[str]
) -> None:
    """Attach trainable adapters to the encoder's linear layers, in place, and freeze the rest.

    ``B`` starts at zero, so that the encoder's output does not change; ``A`` is drawn from the
    global random generator of torch (`peft` takes no other), which the caller seeds.

    Parameters
    ----------
    encoder : nn.Module
        Encoder without adapters.
    rank, alpha : int
        Rank of the update, and its scale times the rank.
    dropout : float
        Probability of zeroing an input of ``A`` in training.
    targets : collection of str
        Names of the linear layers to adapt.

    Raises
    ------
    ConfigError
        If one of ``targets`` names no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    lora_shapes(encoder, rank, targets)
    names = [name for name, _ in _target_linears(encoder, targets)]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, bias="none"
    )
    inject_adapter_in_model(config, encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def _peft_layers(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, wrapper) of each linear layer that `add_lora` adapted."""
    for name, module in encoder.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            yield name, module


def extract_lora(encoder: nn.Module) -> dict[str, Tensor]:
    """Copy the adapters out of an encoder that `add_lora` prepared.

    Returns
    -------
    dict
        ``<module>.lora_a`` (rank, in) and ``<module>.lora_b`` (out, rank), on the CPU; empty if
        the encoder has no adapters.
    """
    tensors = {}
    for name, layer in _peft_layers(encoder):
        for key, factors in (("lora_a", layer.lora_A), ("lora_b", layer.lora_B)):
            tensors[f"{name}.{key}"] = factors[_PEFT_ADAPTER].weight.detach().cpu().clone()
    return tensors


def load_lora_into_peft(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into an encoder that `add_lora` prepared, to train on from them.

    Raises
    ------
    AdapterMismatchError
        If names or shapes differ from the attached adapters.
    """
    current = extract_lora(encoder)
    check_tensors(tensors, {k: tuple(v.shape) for k, v in current.items()}, "the attached adapters")
    with torch.no_grad():
        for name, layer in _peft_layers(encoder):
            layer.lora_A[_PEFT_ADAPTER].weight.copy_(tensors[f"{name}.lora_a"])
            layer.lora_B[_PEFT_ADAPTER].weight.copy_(tensors[f"{name}.lora_b"])


# --- inference ------------------------------------------------------------------------------


def merge_lora(
    encoder: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    alpha: int,
    rank: int,
    targets: Collection[str],
) -> None:
    """Add ``alpha / rank * B @ A`` to the weights of the plain encoder, in place.

    Parameters
    ----------
    encoder : nn.Module
        Encoder without `peft` adapters.
    tensors : Mapping
        What `extract_lora` returned.
    alpha, rank, targets
        As trained.

    Raises
    ------
    AdapterMismatchError
        If the tensors are not exactly those of the encoder's target layers.
    """
    check_tensors(tensors, lora_shapes(encoder, rank, targets), "the encoder's linear layers")
    with torch.no_grad():
        for name, layer in _target_linears(encoder, targets):
            weight: Tensor = layer.weight
            a, b = (tensors[f"{name}.{key}"].to(weight) for key in ("lora_a", "lora_b"))
            weight.add_(b @ a, alpha=alpha / rank)


def parameter_budget(model: nn.Module) -> dict[str, int]:
    """Count the parameters of the live model.

    Returns
    -------
    dict
        Parameters of each child module without its adapters, then ``lora`` (all adapters),
        ``total`` and ``trainable``.

    Examples
    --------
    >>> parameter_budget(nn.Sequential(nn.Linear(2, 3)))
    {'0': 9, 'lora': 0, 'total': 9, 'trainable': 9}
    """
    budget = dict.fromkeys((name for name, _ in model.named_children()), 0)
    budget.update(lora=0, total=0, trainable=0)
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        part = "lora" if ".lora_" in name else name.partition(".")[0]
        budget[part] = budget.get(part, 0) + count
        budget["total"] += count
        budget["trainable"] += count if parameter.requires_grad else 0
    return budget
