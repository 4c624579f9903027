"""The network that goes on learning at a site, and the file that what it learned goes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from wmh_lora.config import InferenceConfig, ModelConfig
from wmh_lora.errors import ConfigError
from wmh_lora.files import file_sha256
from wmh_lora.models.encoders import encoder_spec
from wmh_lora.models.lora import add_lora
from wmh_lora.models.lora_settings import LoraSettings
from wmh_lora.models.model_file import ModelCard, assemble_network, save_model
from wmh_lora.models.network import WMHNet
from wmh_lora.models.registry import Model, load_model
from wmh_lora.models.site_adapter import (
    AdapterCard,
    adapter_ranks,
    adapter_tensors,
    save_adapter,
)
from wmh_lora.training.start import SettledNet

__all__ = ["METHODS", "Base", "Method", "Record", "free_adapter", "free_all"]

Method = Literal["lora", "full"]
METHODS: tuple[Method, ...] = get_args(Method)
"""``lora`` trains an adapter; ``full`` trains every weight, for comparison."""


@dataclass(frozen=True)
class Record:
    """What goes into the file beside the weights.

    Attributes
    ----------
    setting : InferenceConfig
        Threshold and lesion size that were chosen.
    planes : int
        See `wmh_lora.models.site_adapter.AdapterCard`.
    training, scans, cross_validation, versions
        See `wmh_lora.models.site_adapter.AdapterCard`.
    """

    setting: InferenceConfig
    planes: int
    training: dict[str, Any]
    scans: tuple[dict[str, str], ...] = ()
    cross_validation: dict[str, Any] | None = None
    versions: dict[str, str] | None = None


class Base:
    """The model that is adapted.

    Parameters
    ----------
    path : Path
        Model file.
    base_weights : Path, optional
        Checkpoint of its base encoder; by default the installed or cached one.
    method : {"lora", "full"}
        What is trained.

    Raises
    ------
    ConfigError
        If the method is unknown.
    """

    def __init__(self, path: Path, base_weights: Path | None, method: Method) -> None:
        if method not in METHODS:
            raise ConfigError(f"Unknown method {method!r}; choose one of {', '.join(METHODS)}.")
        self.path, self.base_weights, self.method = path, base_weights, method
        self.sha256 = file_sha256(path)

    def model(self) -> Model:
        """Load the model as it is."""
        return load_model(self.path, base_weights=self.base_weights)

    def learning_net(self, seed: int) -> SettledNet:
        """Make a network that computes what the base does, ready for training.

        Raises
        ------
        WeightsError
            If the base cannot be loaded, or an adapter of it would be too large.
        """
        net, card = assemble_network(self.path, self.base_weights)
        if self.method == "full":
            return free_all(net)
        return free_adapter(net, adapter_ranks(net, _targets(card.model)), seed)

    def save(
        self, net: SettledNet, card: ModelCard, target: Path, record: Record, *, overwrite: bool
    ) -> None:
        """Write what the network has learned: an adapter, or with ``full`` a model.

        Parameters
        ----------
        net : SettledNet
            From `learning_net`, trained.
        card : ModelCard
            Of the base.
        target : Path
            File to write.
        record : Record
            What to say about it.
        overwrite : bool
            Replace a file that exists.

        Raises
        ------
        WeightsError
            If a value is not finite, or an adapter is too large.
        DataError
            If the file exists or cannot be written.
        """
        if self.method == "full":
            model = replace(card.model, adaptation="full")
            about = {"adapted_from": card.name, "adapted_from_sha256": self.sha256}
            changed = replace(
                card,
                name=target.stem,
                model=model,
                inference=record.setting,
                base_seed=None,
                training={**about, **record.training, "scans": list(record.scans)},
                metrics=record.cross_validation or {},
            )
            save_model(target, net, changed, half=True, overwrite=overwrite)
            return
        site = AdapterCard(
            name=target.stem,
            base_name=card.name,
            base_sha256=self.sha256,
            lora_ranks=adapter_ranks(net, _targets(card.model)),
            threshold=record.setting.threshold_of(record.planes),
            min_voxels=record.setting.min_voxels,
            planes=record.planes,
            training=record.training,
            scans=record.scans,
            cross_validation=record.cross_validation or {},
            versions=record.versions or {},
        )
        save_adapter(target, adapter_tensors(net), site, overwrite=overwrite)

    def load(self, path: Path) -> Model:
        """Load what `save` wrote, as ``wmh-lora segment`` does."""
        if self.method == "full":
            return load_model(path)
        return load_model(self.path, base_weights=self.base_weights, adapter=path)


def free_all(net: WMHNet) -> SettledNet:
    """Let every weight of a finished network learn."""
    net.adaptation = "full"
    net.requires_grad_(True)
    _keep_t1(net)
    return SettledNet.of(net)


def free_adapter(
    net: WMHNet, ranks: Mapping[str, int], seed: int, *, decoder: bool = True
) -> SettledNet:
    """Let low-rank updates of a finished network's encoder learn, and what is around it.

    Parameters
    ----------
    net : WMHNet
        Changed in place.
    ranks : mapping
        Rank by the layer's own name; empty for an encoder that stays as it is.
    seed : int
        Of the updates' starting values.
    decoder : bool
        Let decoder and channel adapter learn as well.
    """
    net.adaptation = "lora"
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_lora(net.encoder, LoraSettings(ranks))
    net.decoder.requires_grad_(decoder)
    net.adapter.requires_grad_(decoder)
    _keep_t1(net)
    return SettledNet.of(net)


def _keep_t1(net: WMHNet) -> None:
    """Leave what stands for T1, or its absence, as it is: sites give FLAIR alone to learn from."""
    if net.adapter.t1_channels:
        net.adapter.t1_stem.requires_grad_(False)
        net.adapter.t1_missing.requires_grad_(False)


def _targets(config: ModelConfig) -> tuple[str, ...]:
    """Own names of the encoder's linear layers that are adapted."""
    if config.adaptation == "lora":
        return config.lora_targets
    return tuple(encoder_spec(config.encoder).lora_ranks) or ModelConfig.lora_targets
