"""Inference backends: what computes the network.

The network of a loaded model is exported once into the cache, in the folder ``backends`` beside
the base weights, and checked there; a later start finds it by the model's checksum and the
versions of everything that took part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from wmh_lora._version import __version__
from wmh_lora.errors import ConfigError, DataError, WeightsError, WMHError
from wmh_lora.files import write_failure
from wmh_lora.logs import LOGGER
from wmh_lora.models.export import ExportFormat, export_model, source_network
from wmh_lora.models.export_runtime import (
    ExportedNetwork,
    OnnxNetwork,
    OpenVinoNetwork,
    optional,
)
from wmh_lora.models.registry import Model
from wmh_lora.models.weights import cache_dir

__all__ = ["BACKENDS", "cached_export", "with_backend"]


@dataclass(frozen=True)
class _Backend:
    """A runtime, the format that it reads, and the packages that making and running it take."""

    kind: ExportFormat
    filename: str
    network: Callable[[Path, int], ExportedNetwork]
    packages: tuple[str, ...]


_RUNTIMES: Mapping[str, _Backend] = {
    "onnxruntime": _Backend("onnx", "model.onnx", OnnxNetwork, ("onnx", "onnxruntime")),
    "openvino": _Backend("openvino", "model.xml", OpenVinoNetwork, ("openvino",)),
}

BACKENDS: tuple[str, ...] = ("torch", *_RUNTIMES)
"""Names that `with_backend` takes; ``"torch"`` needs no further package and runs on GPUs."""


def with_backend(model: Model, name: str) -> nn.Module:
    """Return the module that computes the network of a model.

    Where the backend's package is missing, or the network cannot be converted or kept, the
    model's own module is returned after one warning.

    Parameters
    ----------
    model : Model
        From `load_model`.
    name : str
        A member of `BACKENDS`.

    Returns
    -------
    nn.Module
        Maps (B, C, H, W) float32 in [0, 1] to logits (B, structures, H, W) on the same device,
        with the attribute ``size_multiple``. Other backends than torch compute on the CPU, with
        the number of threads that PyTorch is set to now.

    Raises
    ------
    ConfigError
        If the name is unknown.
    """
    if name not in BACKENDS:
        raise ConfigError(f"Unknown backend {name!r}; known are {', '.join(BACKENDS)}.")
    if name == "torch":
        return model.net
    try:
        return _exported_network(model, name)
    except WMHError as error:
        reason = " ".join(str(error).split())
        LOGGER.warning("The backend %s cannot be used, PyTorch is. %s", name, reason)
        return model.net


def cached_export(model: Model, name: str) -> Path:
    """Place in the cache of what a backend runs, whether or not it is there.

    Raises
    ------
    ConfigError
        If a package of the backend is missing.
    """
    backend = _RUNTIMES[name]
    # of the modules: onnxruntime comes from distributions of several names
    versions = {package: str(optional(package).__version__) for package in backend.packages}
    key = [model.checksum, __version__, torch.__version__, versions]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "backends" / digest[:32] / backend.filename


def _exported_network(model: Model, name: str) -> ExportedNetwork:
    """Load the cached export of a model, which is made first if it is absent or damaged."""
    source_network(model)  # the cache must not answer for what could not be exported
    backend, path = _RUNTIMES[name], cached_export(model, name)
    multiple = int(getattr(model.net, "size_multiple", 1))
    if path.is_file():
        try:
            return backend.network(path, multiple)
        except WeightsError as error:
            LOGGER.info("%s It is made again.", error)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Cannot make {path.parent}: {write_failure(path, error)}.") from error
    LOGGER.info("Converting %s for %s, once.", model.path, name)
    export_model(model, path, backend.kind, overwrite=True)
    return backend.network(path, multiple)
