"""Frozen settings of preprocessing, network and inference; `wmh_lora.config_reading` reads them."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wmh_lora.config_reading import from_dict, require
from wmh_lora.sizes import parse_size

__all__ = [
    "PREPROCESS_VERSIONS",
    "TTA_MODES",
    "Adaptation",
    "DecoderKind",
    "InferenceConfig",
    "ModelConfig",
    "Precision",
    "PreprocessConfig",
]

PlaneMode = Literal["one", "all"]
TtaMode = Literal["none", "flip", "d4"]
TTA_MODES: tuple[TtaMode, ...] = ("none", "flip", "d4")
PROBABILITY_STEPS = 4096
"""Steps in which the engine tells probabilities."""
Precision = Literal["auto", "float32", "bfloat16"]
Adaptation = Literal["lora", "frozen", "full"]
DecoderKind = Literal["pyramid", "upsampling"]

PREPROCESS_VERSIONS = (2, 3)
"""Ways of making the network's input, the newest last: a model goes on seeing what it was trained
on. They differ in how head and white matter are found, see
`wmh_lora.preprocess_head.HEAD_RULES`."""


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
        require(known, "version", f"one of {PREPROCESS_VERSIONS}", self.version)
        size = self.pixel_size_mm
        require(math.isfinite(size) and size > 0, "pixel_size_mm", "a positive length", size)
        for name in ("context_mm", "margin_mm"):
            length = getattr(self, name)
            require(math.isfinite(length) and length >= 0, name, "zero or more", length)
        require(self.multiple_px >= 1, "multiple_px", "at least 1", self.multiple_px)


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
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.in_channels % 2 == 1, "in_channels", "odd", self.in_channels)
        t1 = self.t1_channels
        require(t1 == 0 or (t1 > 0 and t1 % 2 == 1), "t1_channels", "0, or odd", t1)
        for name, options in (("adaptation", Adaptation), ("decoder", DecoderKind)):
            known = typing.get_args(options)
            require(getattr(self, name) in known, name, " or ".join(known), getattr(self, name))
        dropout = self.lora_dropout
        require(0.0 <= dropout < 1.0, "lora_dropout", "in [0, 1)", dropout)
        for name in ("lora_targets", "structures"):
            values = getattr(self, name)
            distinct = len(values) > 0 and len(set(values)) == len(values)
            require(distinct, name, "one or more distinct names", values)
        ranks = dict(self.lora_ranks)
        ok = set(ranks) <= set(self.lora_targets) and all(rank >= 1 for rank in ranks.values())
        require(ok, "lora_ranks", "ranks of at least 1 for members of lora_targets", ranks)
        require("wmh" in self.structures, "structures", "a list with 'wmh'", self.structures)
        channels = self.decoder_channels
        ok = len(channels) > 0 and min(channels) >= 1
        require(ok, "decoder_channels", "positive channel counts", channels)


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
    zoom : float
        Above 1, slices with evidence of a lesion are seen once more, so many times larger, around
        the evidence, and what is found is averaged; at most 2.
    batch_size : int
        Slices sent through the network at once. Changes memory and speed, not results.
    adaptive : bool
        Compute no slices without a head, and show the further views of `tta` and planes only slices
        in or beside which the first view finds evidence of a lesion. An approximation, see
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
    zoom: float = 1.0
    batch_size: int = 2
    adaptive: bool = True
    precision: Precision = "float32"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        require(0.0 < self.threshold < 1.0, "threshold", "between 0 and 1", self.threshold)
        three = self.threshold_three_planes
        require(
            three is None or 0.0 < three < 1.0, "threshold_three_planes", "between 0 and 1", three
        )
        require(self.min_voxels >= 0, "min_voxels", "zero or more", self.min_voxels)
        require(0.0 <= self.min_peak <= 1.0, "min_peak", "between 0 and 1", self.min_peak)
        require(
            0.0 <= self.min_contrast < 1.0, "min_contrast", "from 0 to below 1", self.min_contrast
        )
        require(self.tta in TTA_MODES, "tta", f"one of {', '.join(TTA_MODES)}", self.tta)
        known = typing.get_args(PlaneMode)
        require(self.planes in known, "planes", " or ".join(known), self.planes)
        require(1.0 <= self.zoom <= 2.0, "zoom", "from 1 to 2", self.zoom)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        known = typing.get_args(Precision)
        require(self.precision in known, "precision", " or ".join(known), self.precision)
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

    def with_threshold(self, threshold: float, planes: int) -> InferenceConfig:
        """Return settings with this threshold for scans seen in so many planes; the other stays.

        With 0 planes, and where three planes have no threshold of their own, it holds for all.

        Examples
        --------
        >>> config = InferenceConfig(threshold=0.4, threshold_three_planes=0.2)
        >>> changed = config.with_threshold(0.3, 3)
        >>> changed.threshold_of(1), changed.threshold_of(3)
        (0.4, 0.3)
        """
        if planes == 0 or self.threshold_three_planes is None:
            return self.changed(threshold=threshold)
        field = "threshold" if planes == 1 else "threshold_three_planes"
        return from_dict(InferenceConfig, {**dataclasses.asdict(self), field: threshold})

    def threshold_of(self, planes: int) -> float:
        """Return the threshold of a scan that was seen in so many planes."""
        if planes == 1 or self.threshold_three_planes is None:
            return self.threshold
        return self.threshold_three_planes
