"""Validation on whole scans along the inference path: preprocess, network, restore, score."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wmh_lora.errors import ConfigError, GridMismatchError
from wmh_lora.evaluation.masks import OTHER_PATHOLOGY_LABEL
from wmh_lora.evaluation.metrics import dice
from wmh_lora.evaluation.sweep import THRESHOLDS
from wmh_lora.files import image_stem
from wmh_lora.models.network import lesion_probability
from wmh_lora.preprocess import Prepared, context_stack, preprocess, restore, to_model_grid
from wmh_lora.t1 import prepare_t1
from wmh_lora.training.settings import RunConfig, ValidationCase
from wmh_lora.volume import Volume

__all__ = ["Validator", "best_dice", "predict_probability"]

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _LoadedCase:
    name: str
    stride: int
    prepared: Prepared
    t1: FloatArray | None
    reference: BoolArray
    counted: BoolArray  # False in other pathology
    healthy: bool
    voxel_volume_ml: float


class Validator:
    """Scores a network on the validation scans of a run.

    Parameters
    ----------
    config
        Scans, preprocessing, and the stride and batch size of validation.

    Raises
    ------
    ConfigError
        If a file does not exist: at once, not hours later.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._cases: list[_LoadedCase] | None = None
        for path in validation_files(config):
            if not path.is_file():
                raise ConfigError(
                    f"the validation file {path} does not exist. Name the data folder with --set "
                    "data.root=PATH, or correct [[validation]]."
                )

    def __call__(self, net: nn.Module) -> Iterator[dict[str, Any]]:
        """Yield one record a scan; a scan with lesions has a ``score``, its Dice at 0.5.

        Record: ``case``, ``dice`` at 0.5, ``best_dice`` and its ``best_threshold``, ``volume_ml``
        and ``reference_ml``, ``seconds``; or for an empty reference ``false_positive_ml``.
        """
        if self._cases is None:
            self._cases = [_load(case, self.config) for case in self.config.validation]
        batch = self.config.training.validation_batch
        for case in self._cases:
            started = time.monotonic()
            probability = predict_probability(
                net,
                case.prepared,
                batch,
                self.config.model.structures,
                stride=case.stride,
                in_channels=self.config.model.in_channels,
                t1=case.t1,
                t1_channels=self.config.model.t1_channels,
            )
            if case.stride == 1:
                probability = restore(probability, case.prepared)
            probability = np.where(case.counted, probability, np.float32(0))
            record = {"case": case.name, **_score(case, probability)}
            yield {**record, "seconds": time.monotonic() - started}


def validation_files(config: RunConfig) -> list[Path]:
    """Every image and reference of the validation scans, and T1 where the model takes it."""
    names: list[str] = []
    for case in config.validation:
        names += [case.image, case.reference, case.t1 if config.model.t1_channels else ""]
    return [config.resolve(name) for name in names if name]


def predict_probability(
    net: nn.Module,
    prepared: Prepared,
    batch: int,
    structures: Sequence[str] = ("wmh",),
    *,
    stride: int = 1,
    in_channels: int = 3,
    t1: FloatArray | None = None,
    t1_channels: int = 0,
) -> FloatArray:
    """Probability of lesion on every ``stride``-th slice of a prepared scan.

    Parameters
    ----------
    net
        Network in evaluation mode; returns logits (B, structures, H, W) of FLAIR slices and,
        with ``t1``, T1 slices.
    prepared
        Scan on the grid of the network.
    batch
        Slices in one forward pass.
    structures
        Meaning of the network's outputs.
    stride
        Slices 0, ``stride``, 2 ``stride``, ... are predicted.
    in_channels, t1_channels
        FLAIR and T1 slices that the network sees at once.
    t1
        (S, H, W) of `wmh_lora.t1.prepare_t1`; None to show FLAIR alone.

    Returns
    -------
    ndarray (ceil(S / stride), H, W) float32
        Probabilities in [0, 1].
    """
    indices = range(0, len(prepared.slices), stride)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    planes = []
    with torch.inference_mode():
        for first in range(0, len(indices), batch):
            shown = indices[first : first + batch]
            stacks = [context_stack(prepared, shown, in_channels)]
            if t1 is not None:
                stacks.append(context_stack(prepared, shown, t1_channels, slices=t1))
            output = net(*(torch.from_numpy(np.ascontiguousarray(s)).to(device) for s in stacks))
            logits = output if isinstance(output, torch.Tensor) else output[0]
            planes.append(lesion_probability(logits, structures).cpu().numpy())
    return np.concatenate(planes).astype(np.float32, copy=False)


def best_dice(
    reference: BoolArray, probability: FloatArray, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[float, float]:
    """Largest Dice over ``thresholds`` and the threshold that gives it.

    NaN for both if the reference is empty and so is every prediction.

    Examples
    --------
    >>> reference = np.array([[[True, True, False, False]]])
    >>> best_dice(reference, np.array([[[0.9, 0.4, 0.3, 0.1]]], np.float32))
    (1.0, 0.35)
    """
    scores = [dice(reference, probability >= threshold) for threshold in thresholds]
    if all(math.isnan(score) for score in scores):
        return math.nan, math.nan
    best = int(np.nanargmax(scores))
    return scores[best], thresholds[best]


def _load(case: ValidationCase, config: RunConfig) -> _LoadedCase:
    image = config.resolve(case.image)
    volume = Volume.read(image)
    labels = np.zeros(volume.shape, dtype=np.float32)
    if case.reference:
        path = config.resolve(case.reference)
        labels = np.rint(Volume.read(path, allow_constant=True).data)
        if labels.shape != volume.shape:
            raise GridMismatchError(
                f"{path} has shape {labels.shape}, its image {image} has {volume.shape}. "
                "Resample the reference to the grid of the image."
            )
    counted = labels != OTHER_PATHOLOGY_LABEL
    reference = (labels > 0) & counted
    healthy = not reference.any()
    prepared = preprocess(volume, config.preprocess)
    t1 = None
    if case.t1 and config.model.t1_channels:
        t1 = prepare_t1(Volume.read(config.resolve(case.t1)), prepared, volume)
    stride = case.stride or config.training.validation_stride
    element_ml = volume.voxel_volume_ml
    if stride > 1:
        # Slices that are left out cannot be restored: compare on the grid of the network.
        on_grid = to_model_grid(reference.astype(np.float32), prepared)
        reference = on_grid[::stride] >= 0.5
        counted = to_model_grid(counted.astype(np.float32), prepared)[::stride] > 0.5
        slices = len(prepared.slices)
        pixel_ml = config.preprocess.pixel_size_mm**2 * prepared.view.spacing_mm[0] / 1000
        element_ml = pixel_ml * slices / len(reference)
    name = case.name or image_stem(image)
    return _LoadedCase(name, stride, prepared, t1, reference, counted, healthy, element_ml)


def _score(case: _LoadedCase, probability: FloatArray) -> dict[str, Any]:
    volume_ml = float(np.count_nonzero(probability >= 0.5)) * case.voxel_volume_ml
    if case.healthy:
        return {"stride": case.stride, "false_positive_ml": volume_ml}
    score = dice(case.reference, probability >= 0.5)
    best, threshold = best_dice(case.reference, probability)
    return {
        "stride": case.stride,
        "score": score,
        "dice": score,
        "best_dice": best,
        "best_threshold": threshold,
        "volume_ml": volume_ml,
        "reference_ml": float(np.count_nonzero(case.reference)) * case.voxel_volume_ml,
    }
