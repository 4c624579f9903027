"""The scans of one fold, and 3-D patches of those that are trained on.

Patches are varied as the slices of `wmh_lora.data.slices` are: in plane, by one transform for all
slices of a scan, which suits thick slices; and they are turned upside down half of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wmh_lora.config import PreprocessConfig
from wmh_lora.data.manifest import Scan
from wmh_lora.data.slice_cache import CachedScan, ScanCache
from wmh_lora.data.sources import DataConfig, LabelledScans, Sample, read_labelled
from wmh_lora.data.split import PARTS
from wmh_lora.data.variation import vary_geometry, vary_intensity
from wmh_lora.errors import DataError
from wmh_lora.preprocess import Prepared
from wmh_lora.t1 import prepare_t1
from wmh_lora.volume import Volume

__all__ = ["Fold", "PatchStream", "TrainingScans", "channels_of", "read_fold"]

FloatArray = npt.NDArray[np.float32]

# A random stream of its own: 0 to 5 are those of other samples and of the trainer.
_PATCH_DRAWS = 6


@dataclass(frozen=True)
class Fold:
    """One division of the scans.

    Attributes
    ----------
    name
        Of the division.
    data
        Names it, for streams of samples.
    train, validation, test
        Usable scans of each part, none empty.
    """

    name: str
    data: DataConfig
    train: LabelledScans
    validation: LabelledScans
    test: LabelledScans

    def file(self, path: str) -> Path:
        """Return where a file of a scan lies."""
        return self.train.manifest.file(path)

    def t1(self, scan: Scan) -> Volume | None:
        """Read the T1 of a scan; None where it has none that can be used."""
        path = self.train.t1(scan)
        return None if path is None else Volume.read(path)


def read_fold(data: DataConfig, name: str) -> Fold:
    """Read one division of the split.

    Raises
    ------
    ConfigError
        If there is no such division.
    DataError
        If one of its parts holds no usable scan; a method is trained, its threshold chosen and its
        masks scored on different people.
    """
    data = replace(data, fold=name)
    parts = {part: read_labelled(data, part) for part in PARTS}
    for part, labelled in parts.items():
        if not labelled.scans:
            raise DataError(
                f"The {part} part of {name} in {data.path(data.split)} holds no usable scan: a "
                "comparison trains, chooses thresholds and tests on different people. Make a split "
                "with all three parts, such as `wmh-lora data split MANIFEST --folds 5`."
            )
    return Fold(name, data, **parts)


def channels_of(
    volume: Volume, prepared: Prepared, t1: Volume | None, *, with_t1: bool
) -> FloatArray:
    """Stack what a 3-D network sees: FLAIR, and T1 (zeros where there is none).

    Returns
    -------
    array (1 or 2, S, H, W) float32 in [0, 1]
    """
    if not with_t1:
        return prepared.slices[None]
    missing = np.zeros_like(prepared.slices)
    return np.stack([prepared.slices, missing if t1 is None else prepare_t1(t1, prepared, volume)])


@dataclass(frozen=True)
class TrainingScans:
    """The preprocessed training scans of a fold, mapped into memory.

    Attributes
    ----------
    scans
        See `wmh_lora.data.slice_cache.CachedScan`.
    spacing_mm
        Median distance of slices, and the pixel size twice.
    t1
        Whether T1 is a second channel.
    """

    scans: tuple[CachedScan, ...]
    spacing_mm: tuple[float, float, float]
    t1: bool

    @classmethod
    def read(
        cls, fold: Fold, config: PreprocessConfig, cache: Path, *, t1: bool = False
    ) -> TrainingScans:
        """Preprocess the training part of a fold into the cache, where that is not done yet.

        Raises
        ------
        DataError
            If a scan cannot be read, or none holds a lesion.
        """
        store = ScanCache(cache, config)
        scans = tuple(store.scan(fold.train, scan, (), t1=t1) for scan in fold.train.scans)
        if not any(scan.lesion for scan in scans):
            raise DataError(f"No training scan of {fold.name} holds a lesion; check the masks.")
        # slices are cut across the longest edge of the voxels
        distances = [max(scan.spacing_mm) for scan in fold.train.scans if scan.spacing_mm]
        pixel = config.pixel_size_mm
        return cls(scans, (float(np.median(distances)), pixel, pixel), t1)

    def channels(self, index: int) -> FloatArray:
        """Return what `channels_of` makes of a scan, (C, S, H, W)."""
        scan = self.scans[index]
        planes = [scan.array("image")]
        if self.t1:
            planes.append(scan.array("t1") if "t1" in scan.files else np.zeros_like(planes[0]))
        return np.stack(planes)


class PatchStream:
    """Makes sample ``i`` on demand: a 3-D patch of a training scan.

    Parameters
    ----------
    scans
        All are shown equally often.
    patch_px
        Slices, rows and columns; what lies outside a scan is zero, and no lesion.
    seed
        Of everything that is drawn.
    lesion_share
        Share of the patches that are placed on a lesion; the others lie anywhere in the scan.
    """

    def __init__(
        self, scans: TrainingScans, patch_px: Sequence[int], seed: int, lesion_share: float
    ) -> None:
        self.scans = scans
        self.patch_px = tuple(patch_px)
        self.seed = seed
        self.lesion_share = lesion_share

    def item(self, index: int) -> Sample:
        """Make sample number ``index``, from 0.

        Returns
        -------
        Sample
            Slices as channels: image (C * D, h, w), target (D, h, w) and valid (D,).
        """
        rng = np.random.default_rng([self.seed, _PATCH_DRAWS, index])
        count = len(self.scans.scans)
        # not 0 at the end, which would be the stream of that sample: seeds are padded with zeros
        order = np.random.default_rng([self.seed, _PATCH_DRAWS, index // count, 1])
        chosen = int(order.permutation(count)[index % count])
        image = self.scans.channels(chosen)
        target = self.scans.scans[chosen].array("target").astype(np.float32)
        if rng.random() < 0.5:
            image, target = image[:, ::-1], target[::-1]
        geometry, *intensities = (int(seed) for seed in rng.integers(2**32, size=1 + len(image)))
        ignored = np.isnan(target)
        planes, target, left_out = vary_geometry(
            geometry, image.reshape(-1, *image.shape[2:]), np.nan_to_num(target), ignored
        )
        varied = planes.reshape(len(image), -1, *planes.shape[1:])
        target[left_out] = np.nan
        images = [
            # a T1 that is missing stays zero, without noise, and so does what is beyond the scan
            vary_intensity(seed, channel) if channel.any() else channel
            for seed, channel in zip(intensities, varied)
        ]
        corner = self._corner(rng, target)
        channels = [_cut(channel, corner, self.patch_px) for channel in images]
        cut = _cut(target, corner, self.patch_px)
        return Sample(np.concatenate(channels), cut, np.ones(len(cut), np.bool_))

    def _corner(self, rng: np.random.Generator, target: FloatArray) -> npt.NDArray[np.int64]:
        """Choose the first slice, row and column of a patch; small scans lie in its middle."""
        patch = np.array(self.patch_px)
        room = np.array(target.shape) - patch
        corner = np.floor(rng.uniform(0.0, 1.0, 3) * (np.maximum(room, 0) + 1)).astype(np.int64)
        lesion = np.argwhere(target > 0)
        if len(lesion) and rng.random() < self.lesion_share:
            inside = np.floor(rng.uniform(0.25, 0.75, 3) * patch).astype(np.int64)
            corner = np.clip(lesion[rng.integers(len(lesion))] - inside, 0, np.maximum(room, 0))
        return np.asarray(np.where(room < 0, room // 2, corner), dtype=np.int64)


def _cut(
    volume: npt.NDArray[Any], corner: npt.NDArray[np.int64], size: Sequence[int]
) -> FloatArray:
    """Cut a box out of (S, H, W), with zeros where it reaches beyond."""
    box = np.zeros(tuple(size), dtype=np.float32)
    low = np.maximum(corner, 0)
    high = np.minimum(corner + np.array(size), volume.shape)
    source = tuple(slice(a, b) for a, b in zip(low, high))
    into = tuple(slice(a, b) for a, b in zip(low - corner, high - corner))
    box[into] = volume[source]
    return box
