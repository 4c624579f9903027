"""Frozen settings of preprocessing, network and inference, and their strict reading.

Settings travel as TOML files (written by people) and as JSON inside model files (written by
`wmh_lora.models.model_file`). Both pass through `from_dict`, which refuses unknown keys and wrong
types: a misspelt option must not silently become its default.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from wmh_lora.errors import ConfigError
from wmh_lora.sizes import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no TOML reader of its own
    import tomli as tomllib

__all__ = [
    "PREPROCESS_VERSIONS",
    "TTA_MODES",
    "Adaptation",
    "DecoderKind",
    "InferenceConfig",
    "ModelConfig",
    "Precision",
    "PreprocessConfig",
    "from_dict",
    "read_toml",
    "to_dict",
]

PlaneMode = Literal["one", "all"]
TtaMode = Literal["none", "flip", "d4"]
TTA_MODES: tuple[TtaMode, ...] = ("none", "flip", "d4")
PROBABILITY_STEPS = 4096
"""Steps in which the engine tells probabilities."""
Precision = Literal["auto", "float32", "bfloat16"]
Adaptation = Literal["lora", "frozen", "full"]
DecoderKind = Literal["pyramid", "upsampling"]

ConfigT = TypeVar("ConfigT")


def _require(condition: bool, name: str, expected: str, found: object) -> None:
    """Raise ConfigError unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"Setting {name!r} must be {expected}, found {found!r}.")


PREPROCESS_VERSIONS = (1, 2)
"""Ways of making the network's input, the newest last: a model goes on seeing what it was trained
on. They differ in how white matter is found, see `wmh_lora.preprocess_head.landmarks`."""


@dataclass(frozen=True)
class PreprocessConfig:
    """How a scan becomes network input; part of the model file.

    Attributes
    ----------
    version : int
        Which of `PREPROCESS_VERSIONS` the network was trained with.
    pixel_size_mm : float
        In-plane pixel size after resampling.
    context_mm : float
        Distance of the neighbouring slices that form the outer channels.
    margin_mm : float
        Margin kept around the head when cropping.
    multiple_px : int
        Height and width are padded to a multiple of this.
    """

    version: int = PREPROCESS_VERSIONS[-1]
    pixel_size_mm: float = 1.0
    context_mm: float = 3.0
    margin_mm: float = 6.0
    multiple_px: int = 8

    def __post_init__(self) -> None:
        known = self.version in PREPROCESS_VERSIONS
        _require(known, "version", f"one of {PREPROCESS_VERSIONS}", self.version)
        size = self.pixel_size_mm
        _require(math.isfinite(size) and size > 0, "pixel_size_mm", "a positive length", size)
        for name in ("context_mm", "margin_mm"):
            length = getattr(self, name)
            _require(math.isfinite(length) and length >= 0, name, "zero or more", length)
        _require(self.multiple_px >= 1, "multiple_px", "at least 1", self.multiple_px)


@dataclass(frozen=True)
class ModelConfig:
    """What the network is built from; with the base weights it fixes every tensor's shape.

    Attributes
    ----------
    encoder : str
        Name of the base encoder, see `wmh_lora.models.encoders`.
    adaptation : {"lora", "frozen", "full"}
        What of the encoder is trained: low-rank updates of its linear layers, nothing, or all of
        it. In the last case its weights are part of the model file; an encoder without base
        weights has no other choice.
    in_channels : int
        FLAIR channels of the input: the slice and its neighbours, the slice itself in the middle.
    t1_channels : int
        T1 channels of the optional second input: 0 for none, or an odd number.
    adapter_width : int
        Hidden channels of the channel adapter.
    lora_rank, lora_alpha : int
        Adapted weights are ``W + lora_alpha / lora_rank * B @ A``.
    lora_dropout : float
        Dropout before ``A`` while training, in [0, 1).
    lora_targets : tuple of str
        Names of the linear layers that are adapted.
    lora_ranks : mapping of str to int
        Rank of single targets where it differs from ``lora_rank``. The scale
        ``lora_alpha / lora_rank`` is that of every target.
    lora_rslora : bool
        Scale by ``alpha / sqrt(rank)`` instead (rank-stabilised LoRA, arXiv:2312.03732).
    lora_dora : bool
        Train the norm of each adapted weight row apart from its direction (DoRA,
        arXiv:2402.09353).
    decoder : {"pyramid", "upsampling"}
        For encoders with features at strides up to 8, or for those at stride 16.
    decoder_skips : bool
        Give the fine levels detail: early encoder features, or those of a small convolutional
        stem where the encoder has none.
    decoder_channels : tuple of int
        Channels of the decoder's levels, coarse to fine.
    structures : tuple of str
        What the output channels mean, in order; ``"wmh"`` is one of them.
    """

    encoder: str = "litemedsam"
    adaptation: Adaptation = "lora"
    in_channels: int = 3
    t1_channels: int = 0
    adapter_width: int = 16
    lora_rank: int = 16
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")
    lora_ranks: Mapping[str, int] = field(default_factory=dict)
    lora_rslora: bool = False
    lora_dora: bool = False
    decoder: DecoderKind = "pyramid"
    decoder_skips: bool = True
    decoder_channels: tuple[int, ...] = (128, 64, 32, 16)
    structures: tuple[str, ...] = ("wmh", "ventricles", "brain")

    def __post_init__(self) -> None:
        for name in ("in_channels", "adapter_width", "lora_rank", "lora_alpha"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.in_channels % 2 == 1, "in_channels", "odd", self.in_channels)
        t1 = self.t1_channels
        _require(t1 == 0 or (t1 > 0 and t1 % 2 == 1), "t1_channels", "0, or odd", t1)
        for name, options in (("adaptation", Adaptation), ("decoder", DecoderKind)):
            known = typing.get_args(options)
            _require(getattr(self, name) in known, name, " or ".join(known), getattr(self, name))
        dropout = self.lora_dropout
        _require(0.0 <= dropout < 1.0, "lora_dropout", "in [0, 1)", dropout)
        for name in ("lora_targets", "structures"):
            values = getattr(self, name)
            distinct = len(values) > 0 and len(set(values)) == len(values)
            _require(distinct, name, "one or more distinct names", values)
        ranks = dict(self.lora_ranks)
        ok = set(ranks) <= set(self.lora_targets) and all(rank >= 1 for rank in ranks.values())
        _require(ok, "lora_ranks", "ranks of at least 1 for members of lora_targets", ranks)
        _require("wmh" in self.structures, "structures", "a list with 'wmh'", self.structures)
        channels = self.decoder_channels
        ok = len(channels) > 0 and min(channels) >= 1
        _require(ok, "decoder_channels", "positive channel counts", channels)


@dataclass(frozen=True)
class InferenceConfig:
    """How probabilities are made and become a mask.

    Attributes
    ----------
    threshold : float
        Voxels of at least this probability are lesion, in (0, 1). A trained model file carries
        the value chosen on its validation scans.
    min_voxels : int
        26-connected components with fewer voxels are removed.
    min_peak : float
        Components whose highest probability stays below it are removed, in [0, 1]: a threshold that
        outlines lesions well also lets much through that is nowhere like a lesion. 0 removes none.
    min_contrast : float
        Excess brightness over the normal tissue within 15 mm that a lesion has at least, as a share
        of the median of the scan's certain lesions, in [0, 1); what is fainter has a probability
        of 0. 0 takes the network's word.
    tta : {"none", "flip", "d4"}
        Views averaged: 1, the 4 flips, or the 8 of the dihedral group.
    planes : {"one", "all"}
        ``"all"`` averages axial, coronal and sagittal slices of scans that are as fine in each;
        others, and all with ``"one"``, are seen in one plane.
    threshold_three_planes : float or None
        ``threshold`` of scans that are seen in three planes: at borders, where planes differ, their
        mean is lower than what one plane gives. None is the same.
    batch_size : int
        Slices sent through the network at once. Changes memory and speed, not results.
    adaptive : bool
        Compute no slices without a head, and show the further views of `tta` only slices in or
        beside which the first view finds evidence of a lesion. An approximation, see
        docs/speed.md.
    precision : {"auto", "float32", "bfloat16"}
        Of the network's products. ``"auto"`` takes half precision where the processor computes in
        it, which is an approximation as well.
    max_memory : str or None
        Memory that the process may take, such as ``"2G"``: batches are made as small as it needs.
        None leaves `batch_size` as it is.
    """

    threshold: float = 0.5
    min_voxels: int = 3
    min_peak: float = 0.0
    min_contrast: float = 0.0
    tta: TtaMode = "none"
    planes: PlaneMode = "one"
    threshold_three_planes: float | None = None
    batch_size: int = 2
    adaptive: bool = True
    precision: Precision = "float32"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        _require(0.0 < self.threshold < 1.0, "threshold", "between 0 and 1", self.threshold)
        three = self.threshold_three_planes
        _require(
            three is None or 0.0 < three < 1.0, "threshold_three_planes", "between 0 and 1", three
        )
        _require(self.min_voxels >= 0, "min_voxels", "zero or more", self.min_voxels)
        _require(0.0 <= self.min_peak <= 1.0, "min_peak", "between 0 and 1", self.min_peak)
        _require(
            0.0 <= self.min_contrast < 1.0, "min_contrast", "from 0 to below 1", self.min_contrast
        )
        _require(self.tta in TTA_MODES, "tta", f"one of {', '.join(TTA_MODES)}", self.tta)
        known = typing.get_args(PlaneMode)
        _require(self.planes in known, "planes", " or ".join(known), self.planes)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        known = typing.get_args(Precision)
        _require(self.precision in known, "precision", " or ".join(known), self.precision)
        if self.max_memory is not None:
            parse_size(self.max_memory)

    def changed(self, **given: Any) -> InferenceConfig:
        """Return the same with the given fields in their place; None leaves one as it is.

        A threshold that is given holds for every scan, in three planes as well.

        Raises
        ------
        ConfigError
            If a value is out of range, or there is no such field.

        Examples
        --------
        >>> config = InferenceConfig(threshold=0.4, threshold_three_planes=0.2)
        >>> config.threshold_of(3), config.changed(threshold=0.3).threshold_of(3)
        (0.2, 0.3)
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        if "threshold" in chosen:
            chosen.setdefault("threshold_three_planes", None)
        return from_dict(InferenceConfig, {**dataclasses.asdict(self), **chosen})

    def threshold_of(self, planes: int) -> float:
        """Return the threshold of a scan that was seen in so many planes."""
        if planes == 1 or self.threshold_three_planes is None:
            return self.threshold
        return self.threshold_three_planes


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a settings dataclass into plain JSON/TOML values (tuples as lists, paths as text).

    Examples
    --------
    >>> to_dict(InferenceConfig(threshold=0.6))["threshold"]
    0.6
    """
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    """One value of `to_dict`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[ConfigT], mapping: Mapping[str, Any]) -> ConfigT:
    """Build the settings dataclass ``cls`` from plain values.

    Nested dataclasses are built from nested mappings, tuples from lists, floats also from
    integers and paths from text. Keys that are absent take their default.

    Parameters
    ----------
    cls : type
        A dataclass whose fields are bool, int, float, str, Path, Literal, tuples and string-keyed
        mappings of these, other such dataclasses, or optional.
    mapping : Mapping
        Plain values by field name.

    Returns
    -------
    An instance of ``cls``.

    Raises
    ------
    ConfigError
        On an unknown or missing key, or a value of the wrong type or range; the message lists all
        that is wrong, nested tables included.

    Examples
    --------
    >>> from_dict(InferenceConfig, {"threshold": 0.6, "tta": "flip"}).tta
    'flip'
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{cls.__name__} is read from a table of settings, found {mapping!r}.")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    problems = [_unknown(name, fields, cls.__name__) for name in mapping if name not in fields]
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(mapping)):
        problems.append(f"Setting {', '.join(map(repr, missing))} of {cls.__name__} is missing.")
    hints = typing.get_type_hints(cls)
    values = {}
    for name in mapping:
        if name in fields:
            try:
                values[name] = _parse(hints[name], mapping[name], name)
            except ConfigError as error:
                problems.append(str(error))
    if required <= values.keys():  # ranges are looked at even where another value is wrong
        try:
            config = cls(**values)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _unknown(name: str, fields: Mapping[str, Any], owner: str) -> str:
    """Say that a key is unknown, and what may have been meant."""
    close = difflib.get_close_matches(str(name), fields, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(fields))}."
    return f"Unknown setting {name!r} for {owner}; {hint}"


def _parse(hint: Any, value: Any, name: str) -> Any:
    """Check ``value`` against the type ``hint`` of the field ``name`` and convert it."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _parse_union(typing.get_args(hint), value, name)
    if origin is Literal:
        options = typing.get_args(hint)
        _require(value in options, name, f"one of {', '.join(map(str, options))}", value)
        return value
    if origin is tuple:
        return _parse_tuple(typing.get_args(hint), value, name)
    if origin is not None and issubclass(origin, Mapping):
        _require(isinstance(value, Mapping), name, "a table", value)
        item_hint = typing.get_args(hint)[1]
        return {str(k): _parse(item_hint, item, f"{name}.{k}") for k, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast("type[Any]", hint), value)
    return _parse_scalar(hint, value, name)


def _parse_union(options: tuple[Any, ...], value: Any, name: str) -> Any:
    """Take the first member of a union that accepts ``value``."""
    if value is None and type(None) in options:
        return None
    *first, last = (option for option in options if option is not type(None))
    for option in first:
        try:
            return _parse(option, value, name)
        except ConfigError:
            continue
    return _parse(last, value, name)


def _parse_tuple(item_hints: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    """Read a list as a tuple, of any length (``tuple[X, ...]``) or of a fixed one."""
    _require(isinstance(value, (list, tuple)), name, "a list", value)
    if len(item_hints) == 2 and item_hints[1] is Ellipsis:
        item_hints = (item_hints[0],) * len(value)
    _require(len(value) == len(item_hints), name, f"a list of {len(item_hints)}", value)
    items, problems = [], []
    for i, (hint, item) in enumerate(zip(item_hints, value, strict=True)):
        try:
            items.append(_parse(hint, item, f"{name}[{i}]"))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(items)


def _parse_scalar(hint: Any, value: Any, name: str) -> Any:
    """Read a bool, int, float, str or Path; booleans do not pass as numbers."""
    if hint is Path:
        _require(isinstance(value, (str, Path)), name, "a path", value)
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if hint not in expected:
        raise TypeError(f"Field {name!r} has the type {hint!r}, which from_dict cannot read.")
    correct = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    _require(correct, name, expected[hint], value)
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into plain values.

    Raises
    ------
    ConfigError
        If the file is absent, unreadable or not TOML.
    """
    try:
        with Path(path).open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"Cannot read the settings file {path}: {reason}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The settings file {path} is not valid TOML: {error}.") from error
