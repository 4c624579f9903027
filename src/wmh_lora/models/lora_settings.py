"""Settings of low-rank adapters: rank by layer name, one scale for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from wmh_lora.config import ModelConfig
from wmh_lora.errors import ConfigError

__all__ = ["LoraSettings", "lora_settings"]


@dataclass(frozen=True)
class LoraSettings:
    """Which layers are adapted, and how.

    Attributes
    ----------
    ranks : Mapping
        Rank by the layer's own name, the last part of its module's name, e.g. ``{"qkv": 64}``.
        Empty: nothing is adapted.
    scale : float
        alpha / rank, the same at every layer: alpha follows the rank.
    dropout : float
        Probability of zeroing an input of ``A`` in training, in [0, 1).
    rslora : bool
        Scale by alpha / sqrt(rank) instead of alpha / rank.
    dora : bool
        Learn the length of the weight's rows as well.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    ranks: Mapping[str, int]
    scale: float = 1.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        for name, rank in self.ranks.items():
            if rank < 1:
                raise ConfigError(f"The LoRA rank of {name!r} must be at least 1, found {rank}.")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"The LoRA scale must be positive, found {self.scale}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"The LoRA dropout must be in [0, 1), found {self.dropout}.")

    def factor(self, layer: str) -> float:
        """Factor ``s`` before ``B A`` of the layers of this own name.

        Examples
        --------
        >>> LoraSettings({"qkv": 64, "lin1": 16}).factor("qkv")
        1.0
        >>> LoraSettings({"qkv": 64, "lin1": 16}, rslora=True).factor("lin1")
        4.0
        """
        return self.scale * math.sqrt(self.ranks[layer]) if self.rslora else self.scale


def lora_settings(config: ModelConfig) -> LoraSettings:
    """Adapters of a network; without ranks unless its ``adaptation`` is ``"lora"``."""
    targets = config.lora_targets if config.adaptation == "lora" else ()
    return LoraSettings(
        ranks={name: config.lora_ranks.get(name, config.lora_rank) for name in targets},
        scale=config.lora_alpha / config.lora_rank,
        dropout=config.lora_dropout,
        rslora=config.lora_rslora,
        dora=config.lora_dora,
    )
