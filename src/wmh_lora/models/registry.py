"""Trained models: those in the package, by name, and those in files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.files import file_sha256
from wmh_lora.models.model_file import ModelCard, load_network

__all__ = ["DEFAULT_MODEL", "Model", "load_model", "model_path", "packaged_models"]

DEFAULT_MODEL = "flair-v1"
"""The packaged model that ``"default"`` stands for."""

_ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Model:
    """A network ready for inference and what its file says about it.

    Attributes
    ----------
    net : nn.Module
        In eval mode, adapters merged; maps (B, C, H, W) to logits (B, structures, H, W).
    card : ModelCard
        Settings of preprocessing and inference, origin, licence and figures.
    path : Path
        The model file.
    sha256 : str
        Of the model file.
    """

    net: nn.Module
    card: ModelCard
    path: Path
    sha256: str

    @property
    def name(self) -> str:
        """Name of the model, for example ``flair-v1``."""
        return self.card.name

    def describe(self) -> dict[str, str]:
        """Return what a report says about the model."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "base_encoder": self.card.model.encoder,
            "base_sha256": self.card.base_sha256,
        }


def packaged_models() -> dict[str, Path]:
    """Return the model files that came with the package, by name."""
    return {path.stem: path for path in sorted(_ASSETS.glob("*.safetensors"))}


def model_path(name_or_path: str | os.PathLike[str] = "default") -> Path:
    """Find a model file by the name of a packaged model or by its path.

    Raises
    ------
    ConfigError
        If it is neither a known name nor an existing file.
    WeightsError
        If the package lacks its default model.
    """
    text = os.fspath(name_or_path)
    models = packaged_models()
    name = DEFAULT_MODEL if text == "default" else text
    if name in models:
        return models[name]
    if text == "default":
        raise WeightsError(
            f"The packaged model {name} is missing from {_ASSETS}; install wmh-lora again."
        )
    path = Path(text)
    if path.is_file():
        return path
    known = ", ".join(["default", *models])
    raise ConfigError(
        f"There is no model file {path} and no packaged model of that name; "
        f"known names are {known}."
    )


def load_model(
    name_or_path: str | os.PathLike[str] = "default",
    *,
    base_weights: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model for inference.

    Parameters
    ----------
    name_or_path : str or path
        ``"default"``, the name of a packaged model, or a model file.
    base_weights : path, optional
        Checkpoint of the frozen base encoder; by default the installed or cached one.

    Raises
    ------
    ConfigError
        If there is no such model.
    WeightsError
        If the model file or the base encoder's weights are absent, damaged or do not fit.
    """
    path = model_path(name_or_path)
    base = None if base_weights is None else Path(base_weights)
    net, card = load_network(path, base)
    return Model(net=net, card=card, path=path, sha256=file_sha256(path))
