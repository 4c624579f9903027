"""Low-rank adaptation (LoRA) of the frozen encoder: attach, extract, merge, count.

LoRA [1]_ adds ``s B A`` to the weight ``W`` of a frozen linear layer, with ``A`` of shape
(rank, in), ``B`` of shape (out, rank) and ``s = alpha / rank``. rsLoRA [2]_ takes
``s = alpha / sqrt(rank)``. DoRA [3]_ also learns the length ``m`` of each row: the
weight is ``m (W + s B A) / ||W + s B A||``, with the norm over the inputs.

Training attaches the adapters with the `peft` library; inference computes the weight itself and
imports no `peft`. Between the two, adapters travel as tensors named ``<module>.lora_a``,
``<module>.lora_b`` and, for DoRA, ``<module>.magnitude``.

References
----------
.. [1] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, arXiv:2106.09685.
.. [2] Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023,
   arXiv:2312.03732.
.. [3] Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wmh_lora.errors import AdapterMismatchError, ConfigError
from wmh_lora.models.lora_settings import LoraSettings, lora_settings

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = [
    "LoraSettings",
    "add_lora",
    "check_tensors",
    "extract_lora",
    "load_lora_into_peft",
    "lora_budget",
    "lora_settings",
    "lora_shapes",
    "merge_lora",
    "parameter_budget",
    "peft_config",
    "unmerge_lora",
]

_PEFT_ADAPTER = "default"  # peft's own name for an unnamed adapter
_SHOWN = 3  # differing keys that an error message lists
_KEPT = "base_weight"  # buffer of a merged layer that holds the weight from before


def own_name(module_name: str) -> str:
    """Last part of a module's name."""
    return module_name.rpartition(".")[2]


def _target_linears(encoder: nn.Module, settings: LoraSettings) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of each linear layer that has a rank.

    Under `peft` the layer is its wrapper, which offers ``in_features`` and ``out_features`` too.
    """
    for name, module in encoder.named_modules():
        is_linear = isinstance(module, nn.Linear) or hasattr(module, "lora_A")
        if is_linear and own_name(name) in settings.ranks:
            yield name, module


def lora_shapes(encoder: nn.Module, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Name and shape of every adapter tensor that fits ``encoder``.

    Raises
    ------
    ConfigError
        If a layer name of the settings is that of no linear layer of the encoder.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    found = set()
    for name, layer in _target_linears(encoder, settings):
        found.add(own_name(name))
        rank = settings.ranks[own_name(name)]
        shapes[f"{name}.lora_a"] = (rank, layer.in_features)
        shapes[f"{name}.lora_b"] = (layer.out_features, rank)
        if settings.dora:
            shapes[f"{name}.magnitude"] = (layer.out_features,)
    absent = sorted(set(settings.ranks) - found)
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
    wrong = [
        _shape_difference(name, tuple(tensors[name].shape), tuple(shape))
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    problems = []
    for label, entries in (
        ("missing", sorted(set(expected) - set(tensors))),
        ("unexpected", sorted(set(tensors) - set(expected))),
        ("other shape", wrong),
    ):
        if entries:
            more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
            problems.append(f"{label}: {', '.join(entries[:_SHOWN])}{more}")
    if problems:
        raise AdapterMismatchError(f"The tensors do not fit {what} ({'; '.join(problems)}).")


def _shape_difference(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """One tensor's wrong shape; for LoRA factors also what it means."""
    text = f"{name} is {found} instead of {expected}"
    rank_axis = {"lora_a": 0, "lora_b": 1}.get(own_name(name))
    if rank_axis is None or len(found) != 2:
        return text
    if found[rank_axis] != expected[rank_axis]:
        text += f", rank {found[rank_axis]} found, rank {expected[rank_axis]} expected"
    if found[1 - rank_axis] != expected[1 - rank_axis]:
        text += ", made for a layer of another width: the base encoder is another one"
    return text


# --- training (peft) ------------------------------------------------------------------------


def peft_config(layers: Collection[str], settings: LoraSettings) -> LoraConfig:
    """Settings in the terms of `peft`, for exactly the ``layers`` of these full module names.

    `peft` matches a listed name also as the ending of a longer one, so that ``proj`` would take the
    convolution ``patch_embed.proj`` as well. A pattern has to match the whole name.
    """
    from peft import LoraConfig

    def alpha(rank: int) -> float:
        value = settings.scale * rank
        return round(value) if math.isclose(value, round(value)) else value

    ranks = settings.ranks
    common = max(ranks.values())
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=alpha(common),
        rank_pattern=others,
        alpha_pattern={name: alpha(rank) for name, rank in others.items()},
        lora_dropout=settings.dropout,
        target_modules="|".join(map(re.escape, layers)),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        bias="none",
    )


def add_lora(encoder: nn.Module, settings: LoraSettings) -> None:
    """Attach trainable adapters to the encoder's linear layers, in place, and freeze the rest.

    ``B`` starts at zero, and DoRA's ``m`` at the length of the base weight's rows, so that the
    encoder's output does not change (with DoRA: but for rounding). ``A`` is drawn from the global
    random generator of torch (`peft` takes no other), which the caller seeds.

    Parameters
    ----------
    encoder : nn.Module
        Encoder without adapters. Settings without ranks leave it as it is.
    settings : LoraSettings
        Layers and ranks.

    Raises
    ------
    ConfigError
        If a layer name of the settings is that of no linear layer.
    """
    if not lora_shapes(encoder, settings):
        return
    from peft import inject_adapter_in_model

    layers = [name for name, _ in _target_linears(encoder, settings)]
    inject_adapter_in_model(peft_config(layers, settings), encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def _peft_layers(encoder: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, wrapper) of each linear layer that `add_lora` adapted."""
    for name, module in encoder.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            yield name, module


def _peft_parameters(encoder: nn.Module) -> dict[str, nn.Parameter]:
    """Live parameters of the attached adapters under our names; empty if there are none."""
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in _peft_layers(encoder):
        parameters[f"{name}.lora_a"] = layer.lora_A[_PEFT_ADAPTER].weight
        parameters[f"{name}.lora_b"] = layer.lora_B[_PEFT_ADAPTER].weight
        if _PEFT_ADAPTER in layer.lora_magnitude_vector:
            parameters[f"{name}.magnitude"] = layer.lora_magnitude_vector[_PEFT_ADAPTER].weight
    return parameters


def extract_lora(encoder: nn.Module) -> dict[str, Tensor]:
    """Copy the adapters out of an encoder that `add_lora` prepared.

    Returns
    -------
    dict
        ``<module>.lora_a`` (rank, in), ``<module>.lora_b`` (out, rank) and, for DoRA,
        ``<module>.magnitude`` (out,), on the CPU; empty if the encoder has no adapters.
    """
    return {name: p.detach().cpu().clone() for name, p in _peft_parameters(encoder).items()}


def load_lora_into_peft(encoder: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into an encoder that `add_lora` prepared, to train on from them.

    Raises
    ------
    AdapterMismatchError
        If names or shapes differ from the attached adapters.
    """
    attached = _peft_parameters(encoder)
    shapes = {name: tuple(parameter.shape) for name, parameter in attached.items()}
    check_tensors(tensors, shapes, "the attached adapters")
    with torch.no_grad():
        for name, parameter in attached.items():
            parameter.copy_(tensors[name])


# --- inference ------------------------------------------------------------------------------


def merge_lora(
    encoder: nn.Module,
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    *,
    keep_base: bool = False,
) -> None:
    """Put the adapted weights in the place of the plain encoder's, in the layers' own precision.

    Parameters
    ----------
    encoder : nn.Module
        Encoder without `peft` adapters.
    tensors : Mapping
        What `extract_lora` returned.
    settings : LoraSettings
        As trained.
    keep_base : bool
        Keep the base weights beside the adapted ones, for `unmerge_lora`.

    Raises
    ------
    AdapterMismatchError
        If the tensors are not exactly those of the encoder's target layers, or a layer holds an
        adapter already that can be taken out. Nothing is changed then.
    """
    check_tensors(tensors, lora_shapes(encoder, settings), "the encoder's linear layers")
    layers = list(_target_linears(encoder, settings))
    merged = next((name for name, layer in layers if hasattr(layer, _KEPT)), None)
    if merged is not None:
        raise AdapterMismatchError(f"The layer {merged} is merged already; unmerge it first.")
    with torch.no_grad():
        for name, layer in layers:
            weight: Tensor = layer.weight
            if keep_base:
                layer.register_buffer(_KEPT, weight.clone(), persistent=False)
            a, b = (tensors[f"{name}.{key}"].to(weight) for key in ("lora_a", "lora_b"))
            weight.add_(b @ a, alpha=settings.factor(own_name(name)))
            if settings.dora:
                length = torch.linalg.vector_norm(weight, dim=1)
                weight.mul_((tensors[f"{name}.magnitude"].to(weight) / length)[:, None])


def unmerge_lora(encoder: nn.Module) -> None:
    """Take merged adapters out again: every bit of the base weights comes back.

    The base weights were kept by ``merge_lora(..., keep_base=True)``. Subtracting the update would
    not do: rounding stays behind, and DoRA's division by the norm cannot be undone.

    Raises
    ------
    AdapterMismatchError
        If no layer of the encoder holds its base weights.
    """
    layers: list[Any] = [layer for layer in encoder.modules() if hasattr(layer, _KEPT)]
    if not layers:
        raise AdapterMismatchError(
            "The encoder holds no base weights; merge with keep_base=True, or load it again."
        )
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(getattr(layer, _KEPT))
            delattr(layer, _KEPT)


# --- counting -------------------------------------------------------------------------------


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


def lora_budget(model: nn.Module) -> dict[str, int]:
    """Count the attached adapters by the own name of the layer, e.g. ``{"qkv": ..., "proj": ...}``.

    Empty if no adapter is attached.
    """
    budget: dict[str, int] = {}
    for name, parameter in _peft_parameters(model).items():
        layer = own_name(name.rpartition(".")[0])
        budget[layer] = budget.get(layer, 0) + parameter.numel()
    return budget
