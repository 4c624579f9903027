"""The model file: one safetensors file with every trained part and what is needed to use it.

Tensors
    ``adapter.*`` and ``decoder.*``: every parameter and every buffer of these modules, BatchNorm's
    running statistics included. ``lora.<module>.lora_a`` and so on: the adapters of the encoder,
    see `wmh_lora.models.lora`. The frozen base weights are not in the file; it names them and
    their checksum. Of an encoder that was trained in full, ``encoder.*`` holds everything instead.
Metadata
    Under the key ``wmh_lora``, a JSON object with the fields of `ModelCard`.

What may be stored in half precision, `wmh_lora.models.tensor_file` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wmh_lora._version import __version__
from wmh_lora.config import (
    Adaptation,
    InferenceConfig,
    ModelConfig,
    PreprocessConfig,
)
from wmh_lora.errors import AdapterMismatchError, ConfigError, WeightsError
from wmh_lora.files import file_sha256
from wmh_lora.models.lora import (
    check_tensors,
    extract_lora,
    lora_settings,
    lora_shapes,
    merge_lora,
)
from wmh_lora.models.network import WMHNet, build_network, fuse_for_inference
from wmh_lora.models.tensor_file import TensorFile, as_float, storable
from wmh_lora.models.weights import resolve_base_weights

__all__ = [
    "FORMAT_VERSION",
    "MODEL_FILE",
    "ModelCard",
    "assemble_network",
    "file_sha256",
    "load_model_file",
    "load_network",
    "load_trained_parts",
    "read_model_card",
    "rewrite_card",
    "save_model",
    "weights_sha256",
]

FORMAT_VERSION = 1
METADATA_KEY = "wmh_lora"
_LORA = "lora."


@dataclass(frozen=True)
class ModelCard:
    """What a model file says about itself.

    Attributes
    ----------
    name : str
        Name of the model, e.g. ``"flair-compact-v1"``.
    model : ModelConfig
        What the network is built from, the base encoder's name included.
    preprocess : PreprocessConfig
        How its input is made.
    inference : InferenceConfig
        Default threshold, component size and test-time augmentation.
    base_sha256 : str
        Checksum of the base encoder's checkpoint, hexadecimal; empty if there was none.
    training : dict
        Training data and procedure, in words and figures.
    metrics : dict
        Validation figures, e.g. ``{"dice": 0.71}``.
    licence : str
        Terms that bind the trained parts.
    package_version : str
        Version of the package that wrote the file.
    format_version : int
        Of this layout.
    base_seed : int or None
        Where the base encoder has random weights: the seed that they are made from. Such a model
        needs no base weights and is of use for tests and benchmarks alone.
    """

    name: str
    model: ModelConfig
    preprocess: PreprocessConfig
    inference: InferenceConfig
    base_sha256: str
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    package_version: str = __version__
    format_version: int = FORMAT_VERSION
    base_seed: int | None = None


MODEL_FILE = TensorFile("model", METADATA_KEY, ModelCard, FORMAT_VERSION)


# --- writing --------------------------------------------------------------------------------


def save_model(
    path: str | Path,
    net: WMHNet,
    card: ModelCard,
    *,
    half: bool = False,
    overwrite: bool = True,
) -> None:
    """Write the trained parts of ``net`` to one file.

    The file appears under its name only when it is complete.

    Parameters
    ----------
    path : str or Path
        Target, usually ending in ``.safetensors``, in a folder that exists.
    net : WMHNet
        Built with ``for_training=True``: LoRA attached, BatchNorm not folded.
    card : ModelCard
        Metadata; ``card.model`` must be the settings ``net`` was built from.
    half : bool
        Store floating-point tensors, except running statistics, as float16.
    overwrite : bool
        Replace a file that exists.

    Raises
    ------
    AdapterMismatchError
        If ``net`` is not the network of ``card.model``.
    WeightsError
        If a trained value is NaN or infinite.
    DataError
        If the file cannot be written, or exists and is not to be replaced.
    """
    tensors = _trained_tensors(net)
    check_tensors(tensors, _expected_shapes(card.model), "the settings of the model card")
    MODEL_FILE.write(path, storable(tensors, path, half=half), card, overwrite=overwrite)


def rewrite_card(
    path: str | Path,
    card: ModelCard,
    *,
    target: str | Path | None = None,
    overwrite: bool = False,
    half: bool = False,
) -> None:
    """Give a model file another card; its tensors stay bit for bit, unless ``half`` is asked for.

    Parameters
    ----------
    path : str or Path
        Model file.
    card : ModelCard
        Its network and base encoder must be those of the file.
    target : str or Path, optional
        Where the result goes; by default it takes the place of the file.
    overwrite : bool
        Replace a ``target`` that exists.
    half : bool
        Store floating-point tensors, except running statistics, as float16.

    Raises
    ------
    AdapterMismatchError
        If the card describes another network.
    WeightsError, DataError
        If the file is absent, damaged or not a model, or the result cannot be written.
    """
    before, tensors = MODEL_FILE.read(path)
    for name in ("model", "preprocess", "base_sha256", "base_seed"):
        if getattr(before, name) != getattr(card, name):
            raise AdapterMismatchError(
                f"The new card of {path} has another {name!r} than the file's tensors were "
                "trained with; only what does not change the network's output can be rewritten."
            )
    if half:
        tensors = storable(tensors, target or path, half=True)
    MODEL_FILE.write(target or path, tensors, card, overwrite=overwrite or target is None)


def _stored_modules(adaptation: Adaptation) -> tuple[str, ...]:
    """Parts of the network that are stored whole."""
    return ("adapter", "decoder", *(["encoder"] if adaptation == "full" else []))


def _trained_tensors(net: WMHNet) -> dict[str, Tensor]:
    """Every parameter and buffer of the stored parts, and the LoRA factors."""
    tensors = {f"{_LORA}{name}": tensor for name, tensor in extract_lora(net.encoder).items()}
    for prefix in _stored_modules(net.adaptation):
        module: nn.Module = getattr(net, prefix)
        for name, tensor in module.state_dict().items():
            tensors[f"{prefix}.{name}"] = tensor
    return tensors


# --- reading --------------------------------------------------------------------------------


def read_model_card(path: str | Path) -> ModelCard:
    """Read a model file's metadata alone.

    Raises
    ------
    WeightsError
        If the file is absent, damaged or not a model.
    """
    return MODEL_FILE.read(path, with_tensors=False)[0]


def weights_sha256(path: str | Path) -> str:
    """Return a checksum of a model file's tensors alone, which a new card does not change.

    Raises
    ------
    WeightsError
        If the file is absent, damaged or not a model.
    """
    _, tensors = MODEL_FILE.read(path)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model_file(path: str | Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """Read a model file and check it against the network its card describes.

    Returns
    -------
    card : ModelCard
    tensors : dict
        Float tensors as float32, named as in the file.

    Raises
    ------
    AdapterMismatchError
        If names or shapes are not exactly those of the network.
    WeightsError
        If the file is absent, damaged or not a model.
    """
    card, stored = MODEL_FILE.read(path)
    try:
        expected = _expected_shapes(card.model)
    except ConfigError as error:
        raise WeightsError(f"The model file {path} cannot be used: {error}") from error
    check_tensors(stored, expected, f"the network that the model file {path} describes")
    return card, as_float(stored)


def _expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the file of a network with these settings."""
    return _stored_shapes(
        build_network(config, None, for_training=False, unset_encoder=True), config
    )


def _stored_shapes(net: WMHNet, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the file of this network, which has no adapters yet."""
    lora = lora_shapes(net.encoder, lora_settings(config))
    shapes = {f"{_LORA}{name}": shape for name, shape in lora.items()}
    for prefix in _stored_modules(config.adaptation):
        module: nn.Module = getattr(net, prefix)
        for name, tensor in module.state_dict().items():
            shapes[f"{prefix}.{name}"] = tuple(tensor.shape)
    return shapes


def load_trained_parts(net: WMHNet, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy all but LoRA into ``net``; return the LoRA tensors, named as by `extract_lora`.

    The LoRA tensors then go to `merge_lora` (inference) or `load_lora_into_peft` (training on).
    """
    for prefix in _stored_modules(net.adaptation):
        start = f"{prefix}."
        module: nn.Module = getattr(net, prefix)
        module.load_state_dict(
            {n[len(start) :]: tensor for n, tensor in tensors.items() if n.startswith(start)}
        )
    return {n[len(_LORA) :]: tensor for n, tensor in tensors.items() if n.startswith(_LORA)}


def load_network(
    path: str | Path, base_weights: str | Path | None = None
) -> tuple[WMHNet, ModelCard]:
    """Make the network of a model file ready for inference.

    As `assemble_network`, with BatchNorm folded into the convolutions.
    """
    net, card = assemble_network(path, base_weights)
    return fuse_for_inference(net), card


def assemble_network(
    path: str | Path, base_weights: str | Path | None = None
) -> tuple[WMHNet, ModelCard]:
    """Make the network of a model file, one that can still be changed.

    Parameters
    ----------
    path : str or Path
        Model file.
    base_weights : str or Path, optional
        Checkpoint of the base encoder; by default the installed or cached one. Not looked at if
        the model needs none: it holds the whole encoder, or was made on random weights.

    Returns
    -------
    net : WMHNet
        In eval mode, on the CPU, float32, LoRA merged.
    card : ModelCard

    Raises
    ------
    AdapterMismatchError
        If the model was trained on other base weights, or its tensors do not fit.
    WeightsError
        If the model file or the base weights are absent or damaged.
    """
    card, tensors = load_model_file(path)
    config = card.model
    full = config.adaptation == "full"
    base = None
    if not full and card.base_seed is None:
        base = _matching_base_weights(path, card, base_weights)
    net = build_network(
        config, base, for_training=False, base_seed=card.base_seed, unset_encoder=full
    )
    lora = load_trained_parts(net, tensors)
    merge_lora(net.encoder, lora, lora_settings(config))
    return net, card


def _matching_base_weights(
    path: str | Path, card: ModelCard, base_weights: str | Path | None
) -> Path:
    """Checkpoint of the base encoder, verified to be the one the model was trained on."""
    base = resolve_base_weights(card.model.encoder, base_weights)
    found = file_sha256(base)
    if found != card.base_sha256:
        raise AdapterMismatchError(
            f"The model {path} was trained on {card.model.encoder} weights with sha256 "
            f"{card.base_sha256[:12]}..., but {base} has {found[:12]}...; use the weights it was "
            f"trained on."
        )
    return base
