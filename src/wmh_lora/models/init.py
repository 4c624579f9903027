"""Untrained model files: where training begins, and what tests and benchmarks can run on."""

from __future__ import annotations

from pathlib import Path

from wmh_lora.config import InferenceConfig
from wmh_lora.errors import ConfigError
from wmh_lora.files import file_sha256
from wmh_lora.models.encoders import encoder_spec
from wmh_lora.models.model_file import ModelCard, save_model
from wmh_lora.models.network import build_network
from wmh_lora.models.presets import model_preset
from wmh_lora.models.weights import resolve_base_weights

__all__ = ["init_model"]


def init_model(
    path: str | Path,
    encoder: str,
    *,
    base_weights: Path | None = None,
    seed: int = 0,
    random_base: bool = False,
    overwrite: bool = False,
) -> ModelCard:
    """Write an untrained model with the preset of an encoder; ``segment --model FILE`` takes it.

    The adapters are at their start, at which they change nothing. The masks mean nothing.

    Parameters
    ----------
    path : str or Path
        Model file to write.
    encoder : str
        Key of `wmh_lora.models.encoders.ENCODERS`.
    base_weights : Path, optional
        Checkpoint of the base encoder; by default the installed or cached one.
    seed : int
        Fixes every random starting value.
    random_base : bool
        Give the base encoder random weights, which loading makes again from the seed: for tests
        and benchmarks where no checkpoint is at hand.
    overwrite : bool
        Replace a file that exists.

    Returns
    -------
    ModelCard
        As written.

    Raises
    ------
    ConfigError
        If the encoder is unknown, or base weights are given that it cannot use.
    WeightsError
        If the base weights are absent or damaged.
    DataError
        If the file exists or cannot be written.
    """
    model, preprocess = model_preset(encoder)
    base_seed: int | None = seed if random_base else None
    base = None
    if encoder_spec(encoder).load is None:
        base_seed = None  # all of the encoder is in the model file
        if base_weights is not None:
            raise ConfigError(
                f"The encoder {encoder!r} has no base weights; leave out {base_weights}."
            )
    elif not random_base:
        base = resolve_base_weights(encoder, base_weights)
    elif base_weights is not None:
        raise ConfigError(f"Base weights are random or from {base_weights}, not both.")
    card = ModelCard(
        name=Path(path).stem,
        model=model,
        preprocess=preprocess,
        inference=InferenceConfig(),
        base_sha256="" if base is None else file_sha256(base),
        training={"step": 0, "seed": seed},
        base_seed=base_seed,
    )
    net = build_network(model, base, for_training=True, seed=seed, base_seed=base_seed)
    save_model(path, net, card, half=True, overwrite=overwrite)
    return card
