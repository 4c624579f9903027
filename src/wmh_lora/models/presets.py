"""Default settings of a model on each encoder."""

from __future__ import annotations

from typing import Any

from wmh_lora.config import ModelConfig, PreprocessConfig
from wmh_lora.models.encoders import encoder_spec

__all__ = ["model_preset"]

# Of the published model. Its slices are 512 x 512, half a millimetre a pixel for most scanners.
_PUBLISHED: dict[str, Any] = {
    "decoder": "upsampling",
    "decoder_skips": False,
    "decoder_channels": (128, 64, 32, 16),
    "lora_dropout": 0.05,
    "structures": ("wmh",),
}
_LITEMEDSAM: dict[str, Any] = {"lora_dropout": 0.0}
_COMPACT: dict[str, Any] = {"adaptation": "full", "decoder_channels": (96, 48, 32, 16)}


def model_preset(encoder: str) -> tuple[ModelConfig, PreprocessConfig]:
    """Return the default settings of a model on this encoder.

    SAM's encoders come with the published settings: LoRA of rank 64 on ``qkv`` and ``proj`` and 32
    on both MLP layers with alpha = rank, the upsampling decoder, pixels of 0.5 mm. LiteMedSAM comes
    with those of `flair-v1`, but for pixels of 1 mm; the compact encoder is trained in full.

    Parameters
    ----------
    encoder : str
        Key of `wmh_lora.models.encoders.ENCODERS`.

    Raises
    ------
    ConfigError
        If the name is unknown.

    Examples
    --------
    >>> model, preprocess = model_preset("medsam-vit-b")
    >>> model.lora_ranks, preprocess.pixel_size_mm
    ({'lin1': 32, 'lin2': 32}, 0.5)
    """
    ranks = encoder_spec(encoder).lora_ranks
    if not ranks:
        return ModelConfig(encoder, **_COMPACT), PreprocessConfig()
    common = max(ranks.values())
    lora: dict[str, Any] = {
        "lora_rank": common,
        "lora_alpha": common,
        "lora_targets": tuple(ranks),
        "lora_ranks": {name: rank for name, rank in ranks.items() if rank != common},
    }
    if encoder == "litemedsam":
        return ModelConfig(encoder, **lora, **_LITEMEDSAM), PreprocessConfig()
    return (
        ModelConfig(encoder, **lora, **_PUBLISHED),
        PreprocessConfig(pixel_size_mm=0.5, multiple_px=16),
    )
