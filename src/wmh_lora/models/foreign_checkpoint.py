"""Reading checkpoints that other projects wrote: safely, strictly, without their BatchNorm."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from wmh_lora.errors import WeightsError

__all__ = [
    "BATCH_NORM_KEYS",
    "check_finite",
    "check_keys_and_shapes",
    "checkpoint_file",
    "fold_batch_norm",
    "read_state",
]

BATCH_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a BatchNorm layer; its batch counter has no part in inference."""

# Names of the weights in a folder as the Hugging Face libraries save it, the safer one first.
_FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
# Under these keys training scripts keep the weights, beside the optimiser's state.
_NESTING_KEYS = ("model", "state_dict")
_PARALLEL = "module."  # what data-parallel training puts before every key


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """Return the weights file that a path stands for.

    Parameters
    ----------
    path : path-like
        A file, or a folder that holds ``model.safetensors`` or ``pytorch_model.bin``.

    Raises
    ------
    WeightsError
        If there is neither.
    """
    given = Path(path).expanduser()
    if given.is_file():
        return given
    if not given.exists():
        raise WeightsError(f"The base weights {given} do not exist; name another file.")
    for name in _FOLDER_FILES:
        if (given / name).is_file():
            return given / name
    raise WeightsError(
        f"The folder {given} holds neither {' nor '.join(_FOLDER_FILES)}; name the weights file."
    )


def read_state(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read a state dictionary of tensors without unpickling any other object.

    A checkpoint that keeps the weights under ``model`` or ``state_dict``, and keys that all begin
    with ``module.``, both as training scripts write them, are understood as well.

    Parameters
    ----------
    path : Path
        What `torch.save` wrote, or a safetensors file, told apart by their content.
    prefix : str
        Only keys that begin with it are kept, without it. BatchNorm's batch counters are dropped.

    Returns
    -------
    dict of str to Tensor
        On the CPU. Tensors may be views of the file, which must not change while they are used.

    Raises
    ------
    WeightsError
        If the file is absent, unreadable, or holds something else.
    """
    try:
        state = _load(path)
    except FileNotFoundError:
        raise WeightsError(f"The base weights {path} do not exist.") from None
    except (
        *(OSError, EOFError, RuntimeError, ValueError, KeyError),
        *(pickle.UnpicklingError, SafetensorError),
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path} cannot be read as a PyTorch checkpoint of tensors ({reason}); "
            "fetch the base weights again, or name another file."
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"{path} holds a {type(state).__name__}, expected a dictionary of tensors."
        )
    nested = next((state[k] for k in _NESTING_KEYS if isinstance(state.get(k), Mapping)), state)
    tensors = {key: value for key, value in nested.items() if isinstance(value, Tensor)}
    if tensors and all(str(key).startswith(_PARALLEL) for key in tensors):
        tensors = {key.removeprefix(_PARALLEL): value for key, value in tensors.items()}
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if isinstance(key, str)
        and key.startswith(prefix)
        and not key.endswith(".num_batches_tracked")
    }


def _load(path: Path) -> Any:
    """Read what a checkpoint holds: tensors and plain containers, no other objects."""
    with path.open("rb") as stream:
        # A safetensors file starts with the length of its header, then the header: a JSON object.
        if stream.read(9)[8:] == b"{":
            return load_file(path)
    # Mapped, the tensors that nobody asks for are never read into memory; only zip archives, which
    # torch writes since 2020, can be.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def check_keys_and_shapes(
    path: Path,
    state: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    *,
    layout: str,
) -> None:
    """Raise WeightsError unless keys and shapes are exactly the expected ones.

    Parameters
    ----------
    path : Path
        For the message.
    state : mapping of str to Tensor
        As read.
    expected : mapping of str to tuple of int
        Shape of every key.
    layout : str
        What the file should be, for the message.
    """
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != shape
        ],
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if found:
        raise WeightsError(
            f"{path} is not {layout}; of the expected keys: {'; '.join(found)}. "
            "Fetch the base weights again, or name another file."
        )


def check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise WeightsError if a tensor holds NaN, infinity, or no floating-point numbers."""
    for key, value in state.items():
        if not value.is_floating_point():
            problem = f"is {value.dtype}, expected floating-point numbers"
        elif not torch.isfinite(value).all():
            problem = "holds NaN or infinite values"
        else:
            continue
        raise WeightsError(
            f"{path} is damaged: {key} {problem}. Fetch the base weights again, or name another "
            "file."
        )


def fold_batch_norm(
    weight: Tensor, norm: Mapping[str, Tensor], eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Fold the BatchNorm that follows a convolution without bias into that convolution.

    ``g * (w * x - mean) / sqrt(var + eps) + b`` is a convolution with the weight
    ``w * g / sqrt(var + eps)`` and the bias ``b - mean * g / sqrt(var + eps)``. Computed in
    float64, so that folding itself costs no accuracy.

    Parameters
    ----------
    weight : Tensor
        (out, in / groups, kh, kw).
    norm : mapping of str to Tensor
        `BATCH_NORM_KEYS`, (out,) each.
    eps : float
        Of the BatchNorm; the default is PyTorch's.

    Returns
    -------
    weight, bias : Tensor
        Of the folded convolution, in the data type of `weight`.
    """
    gain, shift, mean, var = (norm[key].double() for key in BATCH_NORM_KEYS)
    scale = gain / (var + eps).sqrt()
    folded = weight.double() * scale[:, None, None, None]
    return folded.to(weight.dtype), (shift - mean * scale).to(weight.dtype)
