"""How many parameters a model has, where they are, and how large its file is.

Counted on the network itself, built from the settings, so that no figure can go stale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from wmh_lora.config import ModelConfig
from wmh_lora.models.encoders import encoder_spec
from wmh_lora.models.lora import lora_settings, lora_shapes
from wmh_lora.models.network import build_network

__all__ = ["Budget", "model_budget", "published_claim"]

_VIT_B_BLOCKS = 12


@dataclass(frozen=True)
class Budget:
    """Parameters of a model by part, and size of its file.

    Attributes
    ----------
    encoder : int
        Of the base encoder, without adapters.
    encoder_is_trained : bool
        False: it is frozen, and not in the model file.
    lora : dict of str to int
        Adapters, summed over all linear layers of one name; empty without adapters.
    adapter : int
        Of the channel adapter.
    decoder : int
        Of the decoder.
    file_bytes_fp32, file_bytes_fp16 : int
        Tensors in the model file in full and in half precision.
    """

    encoder: int
    encoder_is_trained: bool
    lora: dict[str, int]
    adapter: int
    decoder: int
    file_bytes_fp32: int
    file_bytes_fp16: int

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        encoder = self.encoder if self.encoder_is_trained else 0
        return encoder + sum(self.lora.values()) + self.adapter + self.decoder

    @property
    def frozen(self) -> int:
        """Parameters that stay as they were published."""
        return 0 if self.encoder_is_trained else self.encoder

    @property
    def trainable_percent(self) -> float:
        """Share of the trainable parameters in all."""
        return 100.0 * self.trainable / (self.trainable + self.frozen)


def model_budget(config: ModelConfig) -> Budget:
    """Count the parameters of the network with these settings.

    Raises
    ------
    ConfigError
        If the settings make no network.

    Examples
    --------
    >>> from wmh_lora.models.presets import model_preset
    >>> budget = model_budget(model_preset("medsam-vit-b")[0])
    >>> sum(budget.lora.values()), budget.encoder, budget.trainable
    (6488064, 89670912, 6925468)
    """
    net = build_network(config, None, for_training=False, unset_encoder=True)
    lora: Counter[str] = Counter()
    for name, shape in lora_shapes(net.encoder, lora_settings(config)).items():
        lora[name.split(".")[-2]] += math.prod(shape)
    parts = {
        part: sum(parameter.numel() for parameter in module.parameters())
        for part, module in net.named_children()
    }
    stored = [net.adapter, net.decoder]
    if config.adaptation == "full":
        stored.append(net.encoder)
    return Budget(
        encoder=parts["encoder"],
        encoder_is_trained=config.adaptation == "full",
        lora=dict(lora),
        adapter=parts["adapter"],
        decoder=parts["decoder"],
        file_bytes_fp32=_file_bytes(stored, lora.total(), half=False),
        file_bytes_fp16=_file_bytes(stored, lora.total(), half=True),
    )


def _file_bytes(stored: Iterable[nn.Module], lora: int, *, half: bool) -> int:
    """Bytes of the tensors in a model file: parameters, buffers and adapters."""
    size = 2 if half else 4
    total = size * lora
    for module in stored:
        total += size * sum(parameter.numel() for parameter in module.parameters())
        # running statistics are kept in full precision, and counters are integers
        total += sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    return total


def published_claim(config: ModelConfig, budget: Budget) -> str | None:
    """Say how the published figures compare, if the settings are the published ones.

    Returns
    -------
    str or None
        None for another encoder or other ranks.
    """
    settings = lora_settings(config)
    published_ranks = encoder_spec(config.encoder).lora_ranks
    is_vit_b = config.encoder in ("medsam-vit-b", "sam-vit-b")
    if not is_vit_b or settings.dora or settings.ranks != published_ranks:
        return None
    lora = sum(budget.lora.values())
    qkv = budget.lora["qkv"]
    return (
        f"Published: LoRA of 2.4 M parameters, 3.5 %. At the published ranks (64 on qkv and proj, "
        f"32 on lin1 and lin2) it is {lora // _VIT_B_BLOCKS:,} a block and {lora:,} in all, "
        f"{100 * lora / budget.encoder:.1f} % of the encoder; 2.4 M is rank 64 on qkv alone "
        f"({qkv:,}, {100 * qkv / budget.encoder:.1f} %)."
    )
