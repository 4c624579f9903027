"""Training slices of labelled scans, in epochs.

Scans are preprocessed once, as at inference, into files that every worker maps into its memory:
the memory in use does not grow with their number, and a resumed run finds them made. An epoch shows
every slice that holds a lesion and a share of the others, filled up with more of the others to
whole optimiser steps.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wmh_lora.config import PreprocessConfig, from_dict, to_dict
from wmh_lora.data.augment import cut_square, place_centre
from wmh_lora.data.fields import FloatArray
from wmh_lora.data.manifest import Scan
from wmh_lora.data.sources import IGNORED, DataConfig, Sample, read_labelled, read_masks
from wmh_lora.data.variation import vary_geometry, vary_intensity
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.files import open_atomic
from wmh_lora.preprocess import PREPROCESS_VERSION, preprocess, to_model_grid

__all__ = ["SliceStream", "neighbours"]

_CACHE_FORMAT = 1
# Random streams of their own: 0 to 3 are those of synthetic samples and of the trainer.
_ORDER_DRAWS, _SAMPLE_DRAWS = 4, 5
_log = logging.getLogger("wmh_lora")


@dataclass(frozen=True)
class _Entry:
    """What the cache says about a scan: ``<key>_image.npy`` and ``<key>_target.npy`` go with it.

    Attributes
    ----------
    context_offset
        Distance of the neighbours in slices.
    count
        Slices.
    lesion
        Slices that hold a lesion.
    """

    context_offset: int
    count: int
    lesion: tuple[int, ...]


class SliceStream:
    """Makes sample ``i`` on demand, from the training part of a split.

    Parameters
    ----------
    config
        Names the manifest and the split, and the shares.
    seed
        Of everything that is drawn.
    crop
        Side of the square samples in pixels; smaller slices are padded with zeros, so that a crop
        larger than any head shows whole slices.
    preprocess_config
        The same as at inference.
    structures
        Order of the target's planes; ``wmh`` alone is labelled.
    samples_per_step
        Epochs are whole multiples of it.
    cache
        Folder for preprocessed scans, unless ``config`` names one.
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
    ) -> None:
        self.config = config
        self.seed = seed
        self.crop = crop
        self.preprocess_config = preprocess_config
        self.structures = structures
        self.samples_per_step = samples_per_step
        self.cache = Path(config.cache) if config.cache else cache
        self.part = read_labelled(config, "train", verify=True)
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        if structures != ("wmh",):
            raise ConfigError(
                f"model.structures = {list(structures)}, but a manifest labels lesions alone, and "
                "an output that nothing teaches would spoil the result. Set model.structures = "
                '["wmh"], or mix synthetic scans in with data.real_lanes.'
            )

    def item(self, index: int) -> Sample:
        """Make sample number ``index``, from 0."""
        epoch, place = divmod(index, self.epoch_samples)
        scan, number = self._slices[self._epoch(epoch)[place]]
        rng = np.random.default_rng([self.seed, _SAMPLE_DRAWS, index])
        key = self._keys[scan]
        image = neighbours(
            np.load(self._file(key, "image"), mmap_mode="r"),
            self._entries[scan].context_offset,
            int(number),
        )
        label = np.load(self._file(key, "target"), mmap_mode="r")[number].astype(np.float32)
        return self._vary(rng, image, label)

    @cached_property
    def epoch_samples(self) -> int:
        """Samples of an epoch, a multiple of those of an optimiser step."""
        lesion, others = len(self._lesion), len(self._others)
        wanted = lesion + round(self.config.background_share * others)
        return -(-wanted // self.samples_per_step) * self.samples_per_step

    def files(self) -> list[Path]:
        """List every file that samples are made from, for the record of a run."""
        names = (self.config.manifest, self.config.split)
        return [*map(self.config.path, names), *self.part.files()]

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

    def _vary(self, rng: np.random.Generator, image: FloatArray, label: FloatArray) -> Sample:
        geometry, intensity = (int(value) for value in rng.integers(2**32, size=2))
        ignored = np.isnan(label)
        image, target, left_out = vary_geometry(
            geometry, image, np.where(ignored, 0, label)[None], ignored[None]
        )
        centre = self._centre(rng, target[0])
        image = np.stack([cut_square(plane, centre, self.crop) for plane in image])
        cut = cut_square(target[0], centre, self.crop)
        cut[cut_square(left_out[0].astype(np.float32), centre, self.crop) > 0] = np.nan
        return Sample(vary_intensity(intensity, image), cut[None], np.array([True]))

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
    def _keys(self) -> list[str]:
        """Names of the scans' files in the cache: another scan, mask or setting, another name."""
        settings = [_CACHE_FORMAT, PREPROCESS_VERSION, to_dict(self.preprocess_config)]
        contents = [[s.image_sha256, s.mask_sha256, *settings] for s in self.part.scans]
        return [hashlib.sha256(json.dumps(c).encode()).hexdigest()[:24] for c in contents]

    @cached_property
    def _entries(self) -> list[_Entry]:
        return [self._entry(s, key) for s, key in zip(self.part.scans, self._keys, strict=True)]

    @cached_property
    def _slices(self) -> npt.NDArray[np.int64]:
        """Scan and slice of every training slice, (N, 2)."""
        pairs = [(s, i) for s, entry in enumerate(self._entries) for i in range(entry.count)]
        return np.array(pairs, dtype=np.int64)

    @cached_property
    def _lesion(self) -> npt.NDArray[np.int64]:
        held = [np.isin(np.arange(entry.count), entry.lesion) for entry in self._entries]
        return np.flatnonzero(np.concatenate(held))

    @cached_property
    def _others(self) -> npt.NDArray[np.int64]:
        return np.setdiff1d(np.arange(len(self._slices)), self._lesion)

    def _file(self, key: str, what: str) -> Path:
        return self.cache / f"{key}_{what}.npy"

    def _entry(self, scan: Scan, key: str) -> _Entry:
        """Read a scan's entry in the cache; make it where there is none."""
        path = self.cache / f"{key}.json"
        if path.is_file():
            return from_dict(_Entry, json.loads(path.read_text(encoding="utf-8")))
        self.cache.mkdir(parents=True, exist_ok=True)
        file = self.part.manifest.file
        case = read_masks(file(scan.image), [("wmh", file(scan.mask))])
        prepared = preprocess(case.volume, self.preprocess_config)
        target = to_model_grid(case.masks["wmh"], prepared)
        lesion = np.flatnonzero((target > 0).any(axis=(1, 2)))
        target[to_model_grid(case.masks[IGNORED], prepared) >= 0.5] = np.nan
        # half precision is exact enough for the share of a pixel that is lesion
        for what, array in (("image", prepared.slices), ("target", target.astype(np.float16))):
            with open_atomic(self._file(key, what), overwrite=True) as stream:
                np.save(stream, array)
        entry = _Entry(prepared.context_offset, len(target), tuple(lesion.tolist()))
        with open_atomic(path, overwrite=True) as stream:  # last: it says that the rest is there
            stream.write(json.dumps(to_dict(entry)).encode())
        return entry


def neighbours(slices: npt.NDArray[np.float32], offset: int, index: int) -> FloatArray:
    """One slice with its neighbours, (3, H, W): a row of `wmh_lora.preprocess.context_stack`.

    Parameters
    ----------
    slices
        (S, H, W), in memory or mapped: only three are read.
    offset
        Distance of the neighbours.
    index
        Of the slice; the outermost one stands in for neighbours beyond the ends.
    """
    return np.stack([slices[min(max(index + d, 0), len(slices) - 1)] for d in (-offset, 0, offset)])
