"""Checkpoints from which training resumes bit for bit on CPU.

A checkpoint holds what the base weights and the configuration do not: trained parameters,
buffers, optimiser moments, averaged weights, the state of torch's random generator (dropout)
and the position in the sample stream. Frozen parameters are not stored.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wmh_lora.errors import WeightsError
from wmh_lora.models.lora import load_lora_into_peft
from wmh_lora.models.model_file import ModelCard, load_model_file, load_trained_parts, save_model
from wmh_lora.models.network import build_network

__all__ = [
    "Checkpoint",
    "checkpoint_paths",
    "export_model",
    "load_newest_checkpoint",
    "load_trained_state",
    "save_checkpoint",
    "trained_state",
]

_FORMAT = 1
_NAME = re.compile(r"^step_(\d{8})\.pt$")
# What torch raises for a truncated or damaged file: archive, pickle and stream errors.
_UNREADABLE = (
    WeightsError,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
_log = logging.getLogger("wmh_lora")


@dataclass
class Checkpoint:
    """State of a training run after ``step`` optimiser steps.

    Attributes
    ----------
    step
        Optimiser steps taken.
    samples_seen
        Index of the next sample of the stream.
    model
        Trained parameters and all buffers by name.
    optimizer
        ``state_dict`` of the optimiser.
    rng_state
        State of torch's global CPU generator.
    average
        Exponential moving average of the trained parameters; empty if it is off.
    best_score, best_step
        Best validation score so far and its step (-1: none yet).
    validated_step
        Step of the last finished validation.
    """

    step: int
    samples_seen: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng_state: Tensor
    average: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = float("-inf")
    best_step: int = -1
    validated_step: int = 0


def trained_state(net: nn.Module) -> dict[str, Tensor]:
    """Parameters that require gradients, and every buffer, copied off the network."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _trained_tensors(net)}


def load_trained_state(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``net`` in place; key set and shapes must agree exactly.

    Raises
    ------
    WeightsError
        If names or shapes differ.
    """
    tensors = dict(_trained_tensors(net))
    missing, unexpected = sorted(tensors.keys() - state.keys()), sorted(state.keys() - tensors)
    if missing or unexpected:
        raise WeightsError(
            f"{source} does not fit this network: missing {missing[:3]}, unexpected "
            f"{unexpected[:3]}. Use the [model] settings that the run was started with."
        )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise WeightsError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, the network needs "
                f"{tuple(tensor.shape)}. Use the [model] settings that the run was started with."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(state[name])


def save_checkpoint(checkpoint: Checkpoint, folder: Path, keep: int = 2) -> Path:
    """Write ``folder/step_<step>.pt`` atomically and delete all but the ``keep`` newest.

    The file is on the disk before it takes its name, so a kill or a power cut at any moment
    leaves the previous checkpoint usable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{checkpoint.step:08d}.pt"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as stream:
            torch.save({"format": _FORMAT, **vars(checkpoint)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    for stale in [*checkpoint_paths(folder)[keep:], *folder.glob(".step_*.tmp")]:
        stale.unlink(missing_ok=True)
    return path


def checkpoint_paths(folder: Path) -> list[Path]:
    """Checkpoint files of a run, newest first."""
    return sorted((p for p in folder.glob("step_*.pt") if _NAME.match(p.name)), reverse=True)


def load_newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Newest checkpoint that can be read, or None if there is none at all.

    Raises
    ------
    WeightsError
        If checkpoints exist and none can be read.
    """
    paths = checkpoint_paths(folder)
    for path in paths:
        try:
            return _read(path)
        except _UNREADABLE as error:
            _log.warning("%s cannot be read (%s); trying the one before it", path, error)
    if paths:
        raise WeightsError(
            f"none of the {len(paths)} checkpoints in {folder} can be read. Delete the folder to "
            "start over."
        )
    return None


def export_model(
    run_dir: Path,
    out: Path,
    *,
    which: Literal["best", "last"] = "best",
    half: bool = True,
    **meta: Any,
) -> ModelCard:
    """Turn a model of a run into a model file to ship.

    Parameters
    ----------
    run_dir
        Folder of the run.
    out
        Model file to write.
    which
        The model that validated best, or the one at the end of the schedule.
    half
        Store float16.
    **meta
        Fields of the model card to set, such as ``name``, ``inference``, ``metrics``; the entries
        of ``training`` and ``metrics`` are added to those of the run.

    Returns
    -------
    ModelCard
        The card as written.

    Raises
    ------
    WeightsError
        If the run holds no such model yet.
    """
    source = run_dir / f"{which}.safetensors"
    if not source.is_file():
        raise WeightsError(f"{source} is not there yet: train until the first validation.")
    card, tensors = load_model_file(source)
    for name in ("training", "metrics"):
        meta[name] = {**getattr(card, name), **meta.get(name, {})}
    card = replace(card, **meta)
    # The file holds no tensor of the frozen encoder, so a random one serves.
    net = build_network(card.model, None, for_training=True)
    load_lora_into_peft(net.encoder, load_trained_parts(net, tensors))
    save_model(out, net, card, half=half)
    return card


def _read(path: Path) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise WeightsError(f"{path} is not a checkpoint of format {_FORMAT} of this program.")
    return Checkpoint(**content)


def _trained_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    yield from net.named_buffers()
