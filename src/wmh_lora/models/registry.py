"""Trained models: those in the package, by name, and those in files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from wmh_lora.errors import ConfigError, WeightsError
from wmh_lora.files import file_sha256
from wmh_lora.models.model_file import ModelCard, assemble_network
from wmh_lora.models.network import fuse_for_inference
from wmh_lora.models.site_adapter import SiteAdapter, load_adapter

__all__ = [
    "DEFAULT_MODEL",
    "Model",
    "describe_model",
    "load_model",
    "model_path",
    "packaged_models",
]

DEFAULT_MODEL = "flair-compact-v1"
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
    adapter : SiteAdapter or None
        What was learned at one site, in the network and in the card's settings already.
    """

    net: nn.Module
    card: ModelCard
    path: Path
    sha256: str
    adapter: SiteAdapter | None = None

    @property
    def name(self) -> str:
        """Name of the model, for example ``flair-compact-v1``, and of its adapter."""
        return self.describe()["name"]

    @property
    def checksum(self) -> str:
        """Of everything that the network is made of: the model file, and the adapter's."""
        return self.sha256 + (self.adapter.sha256 if self.adapter else "")

    def describe(self) -> dict[str, str]:
        """Return what a report says about the model, see `describe_model`."""
        return describe_model(self.card, self.sha256, self.adapter)


def describe_model(card: ModelCard, sha256: str, adapter: SiteAdapter | None) -> dict[str, str]:
    """Return what identifies a model: names and checksums.

    Parameters
    ----------
    card : ModelCard
        Of the model.
    sha256 : str
        Of the model file.
    adapter : SiteAdapter or None
        Used with it; its name is then part of the model's.
    """
    described = {
        "name": card.name,
        "sha256": sha256,
        "base_encoder": card.model.encoder,
        "base_sha256": card.base_sha256,
    }
    if adapter is not None:
        described["name"] += f" + {adapter.card.name}"
        described["adapter"] = adapter.card.name
        described["adapter_sha256"] = adapter.sha256
    return described


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
    adapter: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a model for inference.

    Parameters
    ----------
    name_or_path : str or path
        ``"default"``, the name of a packaged model, or a model file.
    base_weights : path, optional
        Checkpoint of the frozen base encoder; by default the installed or cached one.
    adapter : path, optional
        File that ``wmh-lora adapt`` made of this model: what it learned at one site.

    Raises
    ------
    ConfigError
        If there is no such model.
    AdapterMismatchError
        If the adapter belongs to another model.
    WeightsError
        If the model file, the base encoder's weights or the adapter are absent, damaged or do not
        fit.
    """
    path = model_path(name_or_path)
    sha256 = file_sha256(path)
    site = None if adapter is None else load_adapter(adapter)
    if site is not None:
        site.require_base(path, sha256)
    net, card = assemble_network(path, None if base_weights is None else Path(base_weights))
    if site is not None:
        site.apply(net)
        card = site.adapt_card(card)
    return Model(fuse_for_inference(net), card, path, sha256, site)
