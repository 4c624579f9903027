"""Training slices of labelled scans, in epochs.

Scans are preprocessed once, as at inference, into files that every worker maps into its memory:
the memory in use does not grow with their number, and a resumed run finds them made. An epoch shows
every slice that holds a lesion and a share of the others, filled up with more of the others to
whole optimiser steps.
"""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wmh_lora.config import PreprocessConfig
from wmh_lora.data.augment import cut_square, place_centre
from wmh_lora.data.fields import FloatArray
from wmh_lora.data.slice_cache import CachedScan, ScanCache
from wmh_lora.data.sources import DataConfig, Sample, read_labelled, require_t1
from wmh_lora.data.variation import vary_geometry, vary_intensity
from wmh_lora.errors import ConfigError, DataError

__all__ = ["SliceStream", "neighbours"]

# Random streams of their own: 0 to 3 are those of synthetic samples and of the trainer.
_ORDER_DRAWS, _SAMPLE_DRAWS = 4, 5
_log = logging.getLogger("wmh_lora")


class SliceStream:
    """Makes sample ``i`` on demand, from the training part of a split.

    Parameters
    ----------
    config
        Names the manifest and the split, and the shares.
    seed
        Of everything that is drawn.
    crop
        Side of the square samples in pixels; smaller slices are padded with zeros. 0 shows whole
        slices, in sizes of their own.
    preprocess_config
        The same as at inference.
    structures
        Order of the target's planes. All scans label ``wmh``; the manifest says which label
        others, and the rest have no part in what is learned about them.
    samples_per_step
        Epochs are whole multiples of it.
    cache
        Folder for preprocessed scans, unless ``config`` names one.
    in_channels, t1_channels
        Slices of FLAIR and of T1 in a sample; without T1 channels, T1 scans are not even read.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        crop: int,
        preprocess_config: PreprocessConfig,
        structures: tuple[str, ...],
        samples_per_step: int,
        cache: Path,
        *,
        in_channels: int = 3,
        t1_channels: int = 0,
    ) -> None:
        self.config = config
        self.seed = seed
        self.crop = crop
        self.preprocess_config = preprocess_config
        self.structures = structures
        self.samples_per_step = samples_per_step
        self.cache = Path(config.cache) if config.cache else cache
        self.in_channels, self.t1_channels = in_channels, t1_channels
        self.part = read_labelled(config, "train", verify=True)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        labelled = {"wmh"}.union(*(scan.structures for scan in self.part.scans))
        if unknown := [name for name in structures if name not in labelled]:
            raise ConfigError(
                f"model.structures = {list(structures)}, but no training scan of "
                f"{self.part.manifest.path} has a mask of {' or '.join(unknown)}, and an output "
                "that nothing teaches would spoil the result. Set model.structures = "
                f"{json.dumps([name for name in structures if name in labelled])}, or mix "
                "synthetic scans in with data.real_lanes."
            )
        require_t1(t1_channels, sum(self.part.t1(scan) is not None for scan in self.part.scans))

    def item(self, index: int) -> Sample:
        """Make sample number ``index``, from 0."""
        epoch, place = divmod(index, self.epoch_samples)
        scan, number = (int(value) for value in self._slices[self._epoch(epoch)[place]])
        rng = np.random.default_rng([self.seed, _SAMPLE_DRAWS, index])
        geometry, intensity = (int(value) for value in rng.integers(2**32, size=2))
        planes, masks, ignored = self._slice(scan, number)
        empty = np.zeros_like(planes[0])
        target = np.stack([masks.get(name, empty) for name in self.structures])
        planes, target, left_out = vary_geometry(geometry, planes, target, ignored[None])
        wmh = self.structures.index("wmh")
        if self.crop:
            centre = self._centre(rng, target[wmh])
            planes, target, left_out = (
                np.stack([cut_square(plane, centre, self.crop) for plane in stack])
                for stack in (planes, target, left_out)
            )
        target[wmh, left_out[0]] = np.nan
        image, t1 = planes[: self.in_channels], planes[self.in_channels :]
        return Sample(
            vary_intensity(intensity, image),
            target,
            np.array([name in masks for name in self.structures]),
            # a stream of its own: FLAIR is varied alike with T1 and without
            vary_intensity(int(rng.spawn(1)[0].integers(2**32)), t1) if len(t1) else None,
        )

    @cached_property
    def epoch_samples(self) -> int:
        """Samples of an epoch, a multiple of those of an optimiser step."""
        lesion, others = len(self._lesion), len(self._others)
        wanted = lesion + round(self.config.background_share * others)
        return -(-wanted // self.samples_per_step) * self.samples_per_step

    def files(self) -> list[Path]:
        """List every file that samples are made from, for the record of a run."""
        names = (self.config.manifest, self.config.split)
        return [*map(self.config.path, names), *self.part.files(t1=self.t1_channels > 0)]

    def prepare(self) -> None:
        """Preprocess what is not in the cache yet, before workers start.

        Raises
        ------
        DataError
            A scan cannot be read, or no slice holds a lesion.
        """
        if not len(self._lesion):
            raise DataError(
                f"No slice of the {len(self.part.scans)} training scans of "
                f"{self.part.manifest.path} holds a lesion; check the split and the masks."
            )
        vary_intensity(0, np.zeros((1, 2, 2), np.float32))  # imports MONAI once for all workers
        _log.info(
            "%d training scans, %d slices with lesions, %d without; %d samples an epoch",
            len(self.part.scans),
            len(self._lesion),
            len(self._others),
            self.epoch_samples,
        )

    # -- samples ---------------------------------------------------------------------------------

    def _slice(
        self, scan: int, number: int
    ) -> tuple[FloatArray, dict[str, FloatArray], npt.NDArray[np.bool_]]:
        """FLAIR and, after it, T1 with their neighbours; what is labelled; and what is ignored."""
        cached = self._scans[scan]
        offset = cached.context_offset
        planes = neighbours(cached.array("image"), offset, number, self.in_channels)
        if "t1" in cached.files:
            t1 = neighbours(cached.array("t1"), offset, number, self.t1_channels)
            planes = np.concatenate([planes, t1])
        lesion = cached.array("target")[number].astype(np.float32)
        masks = {"wmh": np.nan_to_num(lesion)}
        for name in set(self.structures) & set(cached.files):
            masks[name] = cached.array(name)[number].astype(np.float32)
        return planes, masks, np.isnan(lesion)

    def _centre(self, rng: np.random.Generator, target: FloatArray) -> npt.NDArray[np.float64]:
        """Centre of the crop; whole slices lie in the middle whatever is drawn."""
        rows, columns = np.nonzero(target > 0)
        if len(rows) and rng.random() < self.config.lesion_share:
            pick = rng.integers(len(rows))
            centre = np.array([rows[pick], columns[pick]], dtype=np.float64)
        else:
            centre = rng.uniform(0.25, 0.75, 2) * target.shape
        return place_centre(rng, centre, target.shape, self.crop)

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Slices of an epoch in the order of showing, as rows of ``_slices``."""
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, _ORDER_DRAWS, epoch])
            others = rng.permutation(self._others)[: self.epoch_samples - len(self._lesion)]
            shown = rng.permutation(np.concatenate([self._lesion, others]))
            # so few slices that a step cannot be filled: some are shown twice
            self._order = epoch, np.resize(shown, self.epoch_samples)
        return self._order[1]

    # -- scans -----------------------------------------------------------------------------------

    @cached_property
    def _scans(self) -> list[CachedScan]:
        cache = ScanCache(self.cache, self.preprocess_config)
        t1 = self.t1_channels > 0
        return [cache.scan(self.part, scan, self.structures, t1=t1) for scan in self.part.scans]

    @cached_property
    def _slices(self) -> npt.NDArray[np.int64]:
        """Scan and slice of every training slice, (N, 2)."""
        pairs = [(s, i) for s, scan in enumerate(self._scans) for i in range(scan.count)]
        return np.array(pairs, dtype=np.int64)

    @cached_property
    def _lesion(self) -> npt.NDArray[np.int64]:
        held = [np.isin(np.arange(scan.count), scan.lesion) for scan in self._scans]
        return np.flatnonzero(np.concatenate(held))

    @cached_property
    def _others(self) -> npt.NDArray[np.int64]:
        return np.setdiff1d(np.arange(len(self._slices)), self._lesion)


def neighbours(
    slices: npt.NDArray[np.float32], offset: int, index: int, channels: int = 3
) -> FloatArray:
    """One slice with its neighbours: a row of `wmh_lora.preprocess.context_stack`.

    Parameters
    ----------
    slices
        (S, H, W), in memory or mapped: only those shown are read.
    offset
        Distance of the neighbours.
    index
        Of the slice; the outermost one stands in for neighbours beyond the ends.
    channels
        Slices shown, an odd number.

    Returns
    -------
    array (channels, H, W)
    """
    shown = (index + offset * (channel - channels // 2) for channel in range(channels))
    return np.stack([slices[min(max(place, 0), len(slices) - 1)] for place in shown])
