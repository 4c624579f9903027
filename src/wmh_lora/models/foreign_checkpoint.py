"""Reading checkpoints that other projects wrote: safely, strictly, without their BatchNorm."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wmh_lora.errors import WeightsError

__all__ = ["BATCH_NORM_KEYS", "check_keys_and_shapes", "fold_batch_norm", "read_state"]

BATCH_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a BatchNorm layer; its batch counter has no part in inference."""


def read_state(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read a state dictionary of tensors without unpickling any other object.

    Parameters
    ----------
    path : Path
        Checkpoint that `torch.save` wrote.
    prefix : str
        Only keys that begin with it are kept, without it. BatchNorm's batch counters are dropped.

    Raises
    ------
    WeightsError
        If the file is absent, unreadable, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise WeightsError(f"The base weights {path} do not exist.") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{path} cannot be read as a PyTorch checkpoint of tensors ({reason}); "
            "fetch the base weights again, or name another file."
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"{path} holds a {type(state).__name__}, expected a dictionary of tensors."
        )
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if isinstance(key, str)
        and isinstance(value, Tensor)
        and key.startswith(prefix)
        and not key.endswith(".num_batches_tracked")
    }


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
