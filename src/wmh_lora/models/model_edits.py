"""Other weights for a finished model, each change written as a model file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from wmh_lora.errors import ConfigError
from wmh_lora.models.model_file import MODEL_FILE, ModelCard
from wmh_lora.models.tensor_file import storable

__all__ = [
    "T1_PARTS",
    "carry_t1",
    "interpolate_weights",
    "rescale_logits",
    "scale_t1",
    "t1_comes_off",
]

T1_PARTS = "adapter.t1_"
"""What the names of all tensors begin with that a T1 enters by."""


def rescale_logits(
    path: str | Path,
    target: str | Path,
    structure: str,
    *,
    temperature: float,
    shift: float,
    overwrite: bool = False,
) -> None:
    """Write a model whose logits of one structure are ``logit / temperature + shift``.

    The decoder's fusion of its heads is linear, so the correction goes into its weights: the
    network is as fast as before, in every format that it is exported to.

    Parameters
    ----------
    path, target : str or Path
        Model file, and where the result goes.
    structure : str
        One of the model's.
    temperature, shift : float
        See `wmh_lora.evaluation.calibration.Calibration`.
    overwrite : bool
        Replace a ``target`` that exists.

    Raises
    ------
    ConfigError
        If the model has no such structure, or the temperature is not above zero.
    WeightsError, DataError
        If the file is absent, damaged or not a model, or the result cannot be written.
    """
    card, tensors = MODEL_FILE.read(path)
    if structure not in card.model.structures or not temperature > 0:
        raise ConfigError(
            f"{path} has the structures {list(card.model.structures)}, and logits are divided by a "
            f"temperature above 0; asked for {structure!r} and {temperature}."
        )
    row = card.model.structures.index(structure)
    for name, added in (("decoder.fusion_weight", 0.0), ("decoder.fusion_bias", shift)):
        changed = tensors[name].float()
        changed[row] = changed[row] / temperature + added
        tensors[name] = changed.to(tensors[name].dtype)
    MODEL_FILE.write(target, storable(tensors, target), card, overwrite=overwrite)


def scale_t1(
    path: str | Path, target: str | Path, share: float, *, overwrite: bool = False
) -> None:
    """Write a model in which T1 counts for a ``share`` of what it did; FLAIR alone stays the same.

    Between 0 (it adds nothing) and 1 (as trained). Where T1 was trained alone, the weights lie
    between those of the model before and after that training (Wortsman et al., arXiv:2109.01903).
    Where the model was trained with and without T1, 0 is not what it does without: it learned that
    as well.

    Parameters
    ----------
    path, target : str or Path
        Model file, and where the result goes.
    share : float
        In [0, 1].
    overwrite : bool
        Replace a ``target`` that exists.

    Raises
    ------
    ConfigError
        If the model takes no T1, or the share is out of range.
    WeightsError, DataError
        If the file is absent, damaged or not a model, or the result cannot be written.
    """
    card, tensors = MODEL_FILE.read(path)
    if not card.model.t1_channels or not 0 <= share <= 1:
        raise ConfigError(
            f"{path} has {card.model.t1_channels} channels of T1, and a share lies in [0, 1]; "
            f"asked for {share}."
        )
    name = "adapter.t1_stem.weight"
    tensors[name] = (tensors[name].float() * share).to(tensors[name].dtype)
    MODEL_FILE.write(target, storable(tensors, target), card, overwrite=overwrite)


def carry_t1(
    path: str | Path, source: str | Path, target: str | Path, *, overwrite: bool = False
) -> None:
    """Write a FLAIR-only model with the way in of T1 that another state of it has.

    For a model that was trained on after T1 had been added to an earlier state: what it finds in
    FLAIR alone stays the same, and what a T1 adds is what it added there, so far as the adapter
    has stayed alike. Measure that before use.

    Parameters
    ----------
    path : str or Path
        Model file without T1.
    source : str or Path
        Model file with T1, in other settings the same; its adapter adds nothing for a missing T1.
    target : str or Path
        Where the result goes.
    overwrite : bool
        Replace a ``target`` that exists.

    Raises
    ------
    ConfigError
        If the settings of the two differ in more than T1, or ``source`` changes what is found in
        FLAIR alone.
    WeightsError, DataError
        If a file is absent, damaged or not a model, or the result cannot be written.
    """
    card, tensors = MODEL_FILE.read(path)
    other, others = MODEL_FILE.read(source)
    if card.model.t1_channels or not _alike_but_for_t1(card, other):
        raise ConfigError(
            f"{path} must take no T1, and its [model] and [preprocess] settings be those of "
            f"{source} but for that."
        )
    if not t1_comes_off(others):
        raise ConfigError(f"{source} was trained with and without T1: its parts do not come apart.")
    added = {name: tensor for name, tensor in others.items() if name.startswith(T1_PARTS)}
    card = replace(card, model=other.model)
    MODEL_FILE.write(target, storable({**tensors, **added}, target), card, overwrite=overwrite)


def interpolate_weights(
    path: str | Path,
    other: str | Path,
    target: str | Path,
    share: float,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model whose weights lie between those of two states of it.

    For a model and what it became by training on: between them lies what both know, often better
    than either (Wortsman et al., arXiv:2109.01903). Of two models that were trained apart the mean
    is worthless.

    Parameters
    ----------
    path : str or Path
        Model file, whose settings the result has. Its way in of T1, if it has one, stays as it is
        where ``other`` has none.
    other : str or Path
        The later state. If it was trained on with a newer version of preprocessing, that is the
        result's.
    target : str or Path
        Where the result goes.
    share : float
        Of the later state, in [0, 1]: 0 is the one, 1 the other.
    overwrite : bool
        Replace a ``target`` that exists.

    Raises
    ------
    ConfigError
        If the two differ in their network or the pictures that it sees, or the share is out of
        range.
    WeightsError, DataError
        If a file is absent, damaged or not a model, or the result cannot be written.
    """
    card, tensors = MODEL_FILE.read(path)
    later, others = MODEL_FILE.read(other)
    version = later.preprocess.version
    card = replace(card, preprocess=replace(card.preprocess, version=version))
    if not _alike_but_for_t1(card, later) or not 0 <= share <= 1:
        raise ConfigError(
            f"{path} and {other} must have the same [model] settings but for T1 and the same "
            "[preprocess] settings but for the version, and a share lies in [0, 1]; asked for "
            f"{share}."
        )
    for name, tensor in tensors.items():
        if name in others and tensor.is_floating_point():
            tensors[name] = tensor.float().lerp(others[name].float(), share).to(tensor.dtype)
    MODEL_FILE.write(target, storable(tensors, target), card, overwrite=overwrite)


def _alike_but_for_t1(one: ModelCard, other: ModelCard) -> bool:
    """Whether two models are one network that sees the same pictures, with a T1 or without."""
    model = replace(one.model, t1_channels=other.model.t1_channels)
    return model == other.model and one.preprocess == other.preprocess


def t1_comes_off(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a model file's tensors have parts for T1 that change nothing where it is missing."""
    missing = tensors.get(f"{T1_PARTS}missing")
    return missing is not None and not missing.any()
