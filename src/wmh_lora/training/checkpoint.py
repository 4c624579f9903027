"""Checkpoints from which training resumes bit for bit on CPU.

A checkpoint holds what the base weights and the configuration do not: trained parameters,
buffers, optimiser moments, averaged weights, the scale of the loss and the position in the sample
stream. Frozen parameters are not stored; random numbers follow from the seed and the step.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmh_lora.errors import DataError, WeightsError
from wmh_lora.files import write_failure

__all__ = [
    "Checkpoint",
    "checkpoint_paths",
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
    average
        Exponential moving average of the trained parameters; empty if it is off.
    best_score, best_step
        Best validation score so far and its step (-1: none yet).
    validated_step
        Step of the last finished validation.
    scaler
        ``state_dict`` of the loss scaling of half precision; empty without.
    """

    step: int
    samples_seen: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = float("-inf")
    best_step: int = -1
    validated_step: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


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


def save_checkpoint(
    checkpoint: Checkpoint, folder: Path, keep: int = 2, keep_steps: int = 0
) -> Path:
    """Write ``folder/step_<step>.pt`` atomically and delete older ones.

    The file is on the disk before it takes its name, so a kill or a power cut at any moment
    leaves the previous checkpoint usable.

    Parameters
    ----------
    checkpoint
        What to write.
    folder
        Made if it is not there.
    keep
        So many of the newest stay.
    keep_steps
        Those at multiples of it stay, too; 0 for none.

    Raises
    ------
    DataError
        The file cannot be written, because the disk is full for example.
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
    except (OSError, RuntimeError) as error:
        # torch's writer hides the reason behind an error of its own
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise DataError(
            f"The checkpoint {path} could not be written: {write_failure(path, reason)}. The one "
            "before it is untouched; --resume continues from there."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    older = checkpoint_paths(folder)[keep:]
    stale = [p for p in older if not keep_steps or _step(p) % keep_steps]
    for file in [*stale, *folder.glob(".step_*.tmp")]:
        file.unlink(missing_ok=True)
    return path


def _step(path: Path) -> int:
    return int(path.stem.partition("_")[2])


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


def _read(path: Path) -> Checkpoint:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
        raise WeightsError(f"{path} is not a checkpoint of format {_FORMAT} of this program.")
    content.pop("rng_state", None)  # of versions whose dropout drew from one stream
    return Checkpoint(**content)


def _trained_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    yield from net.named_buffers()
