"""Settings of few-shot adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from wmh_lora.errors import ConfigError
from wmh_lora.training.adapt_network import Method
from wmh_lora.training.settings import TrainingConfig

__all__ = ["AdaptConfig"]


@dataclass(frozen=True)
class AdaptConfig:
    """How a model is adapted.

    Attributes
    ----------
    method : {"lora", "full"}
        Train an adapter, or for comparison every weight.
    minutes : float
        Time for everything, cross-validation included.
    folds : int
        Of the cross-validation; no more than there are persons.
    seed : int
        Of folds, starting values and samples.
    steps : int
        Optimiser steps of each network, where there is time for so many.
    batch_size : int
        Crops a step.
    lora_lr, decoder_lr, adapter_lr, encoder_lr : float
        Peak learning rates of low-rank updates, decoder, channel adapter, and of an encoder that is
        trained in full.
    ema_decay : float
        Decay of the moving average of the weights, which is what is used.
    lanes, crops_per_scan, workers : int
        See `wmh_lora.data.sources.DataConfig` and `wmh_lora.training.settings.TrainingConfig`.
    """

    method: Method = "lora"
    minutes: float = 15.0
    folds: int = 3
    seed: int = 42
    steps: int = 200
    batch_size: int = 8
    lora_lr: float = 1e-3
    decoder_lr: float = 3e-4
    adapter_lr: float = 3e-4
    encoder_lr: float = 1e-4
    ema_decay: float = 0.98
    lanes: int = 4
    crops_per_scan: int = 16
    workers: int = 1

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ConfigError(f"minutes = {self.minutes} is out of range: it must be above 0.")
        if self.folds < 2:
            raise ConfigError(f"folds = {self.folds} is out of range: it must be at least 2.")

    def data(self, fold: str) -> dict[str, Any]:
        """Settings of one training's samples: real scans alone, as the site makes them."""
        return {
            "fold": fold,
            "lanes": self.lanes,
            "real_lanes": self.lanes,
            "crops_per_scan": self.crops_per_scan,
            "extracted_share": 0.0,
        }

    def training(self, steps: int, crop: int) -> TrainingConfig:
        """Settings of one training."""
        return TrainingConfig(
            steps=steps,
            batch_size=self.batch_size,
            crop=crop,
            seed=self.seed,
            lora_lr=self.lora_lr,
            decoder_lr=self.decoder_lr,
            adapter_lr=self.adapter_lr,
            encoder_lr=self.encoder_lr,
            warmup_steps=steps // 10,
            precision="auto",
            ema_decay=self.ema_decay,
            workers=self.workers,
            checkpoint_minutes=0,
            validate_steps=0,
        )
