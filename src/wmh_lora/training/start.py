"""Where training begins: from a finished model, and with part of it alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from wmh_lora.errors import AdapterMismatchError, ConfigError
from wmh_lora.models.lora import load_lora_into_peft
from wmh_lora.models.model_edits import T1_PARTS, t1_comes_off
from wmh_lora.models.model_file import load_model_file, load_trained_parts
from wmh_lora.models.network import WMHNet
from wmh_lora.training.settings import RunConfig

__all__ = ["SettledNet", "start_from_model", "train_t1_alone"]

_log = logging.getLogger("wmh_lora")


class SettledNet(WMHNet):
    """A finished network that goes on learning, every layer as at inference.

    BatchNorm uses its running statistics and leaves them alone: little data would give poor ones,
    and the layers behind it were trained on these.
    """

    @classmethod
    def of(cls, net: WMHNet) -> SettledNet:
        """Take over the parts of a network."""
        mean, std = (
            None if column is None else column.flatten().tolist()
            for column in (net.input_mean, net.input_std)
        )
        return cls(
            net.adapter, net.encoder, net.decoder, adaptation=net.adaptation, mean=mean, std=std
        )

    def train(self, mode: bool = True) -> SettledNet:
        """Stay in evaluation mode; gradients flow all the same."""
        super().train(False)
        return self


def start_from_model(net: WMHNet, config: RunConfig, base_sha256: str, path: Path) -> None:
    """Copy the weights of a finished model into a network that is about to be trained.

    Parameters
    ----------
    net : WMHNet
        As built for training. If it takes T1 and the model does not, its T1 parameters stay as they
        are: at zero, where they change nothing. If the model takes T1 and the network does not,
        what T1 enters by is left out, provided that a missing T1 changes nothing.
    config : RunConfig
        What it was built from, and what it is to be shown: other ``[preprocess]`` settings than the
        model's are told in a warning.
    base_sha256 : str
        Checksum of the base weights that it stands on; empty for none.
    path : Path
        Model file.

    Raises
    ------
    ConfigError
        If the model has other settings.
    AdapterMismatchError
        If it stands on other base weights.
    WeightsError
        If the file is absent, damaged or not a model.
    """
    card, tensors = load_model_file(path)
    if not config.model.t1_channels and t1_comes_off(tensors):
        tensors = {name: t for name, t in tensors.items() if not name.startswith(T1_PARTS)}
        card = replace(card, model=replace(card.model, t1_channels=0))
    asked = replace(config.model, t1_channels=card.model.t1_channels)
    if asked != card.model or card.model.t1_channels not in (0, config.model.t1_channels):
        raise ConfigError(
            f"training.start_from: the [model] settings are not those of {path}, which are "
            f"{card.model}. Only t1_channels may be given to a model that has none, or be 0 where "
            "a missing T1 changes nothing."
        )
    if card.base_sha256 != base_sha256:
        raise AdapterMismatchError(
            f"training.start_from: {path} was trained on base weights with sha256 "
            f"{card.base_sha256[:12] or '(none)'}, these have {base_sha256[:12] or '(none)'}."
        )
    if card.preprocess != config.preprocess:
        _log.warning(
            "training.start_from: %s was trained with %s, and goes on with %s",
            path,
            card.preprocess,
            config.preprocess,
        )
    own = {f"adapter.{name}": value for name, value in net.adapter.state_dict().items()}
    new = {name: value for name, value in own.items() if name not in tensors}
    load_lora_into_peft(net.encoder, load_trained_parts(net, {**tensors, **new}))


def train_t1_alone(net: WMHNet) -> SettledNet:
    """Freeze all but the convolution that T1 enters by.

    What the network computes without T1 then stays what it was, bit for bit.

    Raises
    ------
    ConfigError
        If the network takes no T1.
    """
    if not net.adapter.t1_channels:
        raise ConfigError('training.trained = "t1" needs a model that takes T1: set t1_channels.')
    net.requires_grad_(False)
    net.adapter.t1_stem.requires_grad_(True)
    return SettledNet.of(net)
