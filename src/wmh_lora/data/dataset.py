"""The endless stream of training crops: synthetic scans and real ones, in a fixed order.

Sample ``i`` depends on the seed and ``i`` alone. Samples come in turn from a few *lanes*; each lane
holds one scan for some crops and then the next, and lanes change at different times, so a batch
mixes scans while each scan is made once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.config import PreprocessConfig
from wmh_lora.config_reading import from_dict
from wmh_lora.data.anatomy import Anatomy, mni_anatomy
from wmh_lora.data.anatomy_cache import kept_head, kept_scan
from wmh_lora.data.augment import augment_crop, augment_scan, augment_t1
from wmh_lora.data.bids_folder import bids_t1, labelled_scans
from wmh_lora.data.fields import FloatArray
from wmh_lora.data.lesions import MaskBank, draw_lesions, ventricle_distance
from wmh_lora.data.real_painting import RealAnatomy, paint_lesions
from wmh_lora.data.slices import SliceStream
from wmh_lora.data.sources import (
    DataConfig,
    Sample,
    read_labelled,
    read_masks,
    require_t1,
)
from wmh_lora.data.synthesis import IGNORED, Case, synthesize
from wmh_lora.errors import DataError, GridMismatchError
from wmh_lora.preprocess import (
    WHITE_MATTER_LEVEL,
    Prepared,
    context_stack,
    preprocess,
    to_model_grid,
)
from wmh_lora.t1 import prepare_t1
from wmh_lora.view import Plane, choose_view
from wmh_lora.volume import Volume

__all__ = ["DataConfig", "TrainingStream", "build_stream"]

_MOST_DRAWS = 4

_CAP_CONTRAST = 1.1
"""Brightness, relative to white matter, above which a rim of the ventricles may be a cap."""

_REAL_SHAPES = 0.4
"""Of the scans that lesions are painted into, those that may get shapes of real masks. These are of
multiple sclerosis, as are the real scans themselves; haloes of small-vessel disease are painted."""


class _Files(NamedTuple):
    """A real scan."""

    image: Path
    masks: list[tuple[str, Path]]
    t1: Path | None


@dataclass(frozen=True)
class _Scan:
    """A scan on the network's grid.

    Targets are (n, S, H, W), what is ignored and T1 (S, H, W).
    """

    prepared: Prepared
    targets: FloatArray
    ignored: FloatArray
    valid: npt.NDArray[np.bool_]
    real: bool
    t1: FloatArray | None


class TrainingStream:
    """Makes sample ``i`` on demand.

    Parameters
    ----------
    config
        Sources and their shares.
    seed
        Of everything that is drawn.
    crop
        Side of the crops in pixels; 0 shows whole slices, padded to squares.
    preprocess_config
        The same as at inference.
    structures
        Order of the target's planes.
    in_channels, t1_channels
        Slices of FLAIR and of T1 in a sample. Without T1 channels, no T1 is read or made.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        crop: int,
        preprocess_config: PreprocessConfig,
        structures: tuple[str, ...],
        *,
        in_channels: int = 3,
        t1_channels: int = 0,
    ) -> None:
        self.config = config
        self.in_channels, self.t1_channels = in_channels, t1_channels
        self.seed = seed
        self.crop = crop
        self.preprocess_config = preprocess_config
        self.structures = structures
        self._held: dict[int, tuple[int, _Scan]] = {}

    def item(self, index: int) -> Sample:
        """Make sample number ``index``, from 0."""
        lane, turn = index % self.config.lanes, index // self.config.lanes
        per_scan = self.config.crops_per_scan
        # lanes are out of step, so that new scans are not all made at once
        number = (turn + lane * per_scan // self.config.lanes) // per_scan
        scan = self._scan(lane, number)
        rng = np.random.default_rng([self.seed, 1, index])
        return self._crop(rng, scan)

    def files(self) -> list[Path]:
        """List every file that samples are made from, for the record of a run."""
        paths = list(self._label_maps)
        if self.config.lesion_masks:
            folder = self.config.path(self.config.lesion_masks)
            paths += MaskBank.paths(folder, self.config.exclude_masks)
        for files in self._real_files:
            paths += [files.image, *(path for _, path in files.masks)]
            paths += [files.t1] if files.t1 is not None else []
        if self.config.manifest:
            paths += [self.config.path(name) for name in (self.config.manifest, self.config.split)]
        return paths

    def prepare(self) -> None:
        """Read every source once, before workers start; registers anatomies where needed."""
        _ = self._anatomies, self._bank
        real = sum(files.t1 is not None for files in self._real_files)
        synthetic = self.config.lanes - self.config.real_lanes  # whose scans all have one
        require_t1(self.t1_channels, real + synthetic)
        if self.config.painted_share:
            _ = self._real_anatomies

    def _scan(self, lane: int, number: int) -> _Scan:
        held = self._held.get(lane)
        if held is None or held[0] != number:
            rng = np.random.default_rng([self.seed, 0, lane, number])
            self._held[lane] = (number, self._make_scan(rng, lane))
        return self._held[lane][1]

    def _make_scan(self, rng: np.random.Generator, lane: int) -> _Scan:
        # real lanes are spread evenly, so that every batch has its share
        real = lane * self.config.real_lanes % self.config.lanes < self.config.real_lanes
        t1_file, extracted = None, False
        if real:
            files = self._real_files[rng.integers(len(self._real_files))]
            t1_file = files.t1
            case = self._painted(rng, files, read_masks(files.image, files.masks))
            extracted = "brain" in case.masks and rng.random() < self.config.extracted_share
            case = augment_scan(rng, case, extracted=extracted)
            prepared = self._prepare(rng, case)
        else:
            case, prepared = self.visible_case(rng)
        zero = np.zeros(case.volume.shape, dtype=np.float32)
        targets = np.stack(
            [to_model_grid(case.masks.get(name, zero), prepared) for name in self.structures]
        )
        valid = np.array([name in case.masks for name in self.structures])
        ignored = to_model_grid(case.masks.get(IGNORED, zero), prepared)
        if extracted and self.config.cap_reach_mm and "ventricles" in case.masks:
            ventricles = to_model_grid(case.masks["ventricles"], prepared)
            lesion = targets[self.structures.index("wmh")]
            caps = possible_caps(prepared, ventricles, self.config.cap_reach_mm)
            ignored = np.maximum(ignored, caps & (lesion == 0))
        t1 = None
        second = case.t1 if t1_file is None else Volume.read(t1_file)
        if second is not None:
            t1 = _shown_t1(second, prepared, case.volume, real=real)
        # some programs take the skull off T1 alone; a stream of its own leaves FLAIR's as it is
        if t1 is not None and "brain" in case.masks and rng.spawn(1)[0].random() < 0.5:
            t1[to_model_grid(case.masks["brain"], prepared) < 0.5] = 0.0
        return _Scan(prepared, targets, ignored, valid, real, t1)

    def _painted(self, rng: np.random.Generator, files: _Files, case: Case) -> Case:
        """Paint lesions into some real scans."""
        if not self.config.painted_share:
            return case
        draws = rng.spawn(1)[0]  # of its own: the rest stays as it is
        if draws.random() >= self.config.painted_share:
            return case
        kept = self._real_anatomies.get(files.image)
        if kept is None:
            return case
        anatomy = RealAnatomy.load(kept)
        distance_mm = ventricle_distance(anatomy.tissue)
        bank = self._bank if draws.random() < _REAL_SHAPES else None
        lesions = draw_lesions(draws, anatomy.tissue, anatomy.to_mni_mm, distance_mm, bank)
        return paint_lesions(draws, case, anatomy, lesions)

    def visible_case(self, rng: np.random.Generator) -> tuple[Case, Prepared]:
        """Draw synthetic scans until the lesions of one can be seen, or patience ends."""
        for _ in range(_MOST_DRAWS if self.config.min_excess > 0 else 1):
            case = self.synthetic_case(rng)
            prepared = self._prepare(rng, case)
            lesions = to_model_grid(case.masks["wmh"], prepared) > 0.5
            if not lesions.any():
                break
            excess = float(np.median(prepared.slices[lesions])) / WHITE_MATTER_LEVEL - 1.0
            if excess >= self.config.min_excess:
                break
        return case, prepared

    def _prepare(self, rng: np.random.Generator, case: Case) -> Prepared:
        return preprocess(case.volume, self.preprocess_config, self._plane(rng, case.volume))

    def _plane(self, rng: np.random.Generator, volume: Volume) -> Plane | None:
        """Now and then another plane than the usual, where the scan is as fine in it."""
        share = self.config.other_planes_share
        pixel_size_mm = self.preprocess_config.pixel_size_mm
        if not share or not choose_view(volume, pixel_size_mm).is_isotropic:
            return None
        draws = rng.spawn(1)[0]  # of its own: the scan stays as it is
        if draws.random() >= share:
            return None
        return "coronal" if draws.random() < 0.5 else "sagittal"

    def synthetic_case(self, rng: np.random.Generator) -> Case:
        """Make one synthetic scan of these sources."""
        heads = self._anatomies
        if not heads or rng.random() < self.config.mni_share:
            anatomy = mni_anatomy()
        else:
            anatomy = Anatomy.load(heads[rng.integers(len(heads))])
        return synthesize(rng, anatomy, self._bank, with_t1=self.t1_channels > 0)

    def _crop(self, rng: np.random.Generator, scan: _Scan) -> Sample:
        count, height, width = scan.prepared.slices.shape
        lesion = scan.targets[self.structures.index("wmh")]
        load = lesion.sum(axis=(1, 2))
        if load.any() and rng.random() < self.config.lesion_share:
            # slices by the square root of their load: large lesions must not be all that is seen
            index = int(rng.choice(count, p=np.sqrt(load) / np.sqrt(load).sum()))
            rows, columns = np.nonzero(lesion[index] > 0)
            pick = rng.integers(len(rows))
            centre = np.array([rows[pick], columns[pick]])
        else:
            index = int(rng.integers(count))
            centre = rng.uniform(0.25, 0.75, 2) * (height, width)
        image = context_stack(scan.prepared, [index], self.in_channels)[0]
        t1 = None
        if scan.t1 is not None:
            t1 = context_stack(scan.prepared, [index], self.t1_channels, slices=scan.t1)[0]
        size = self.crop or max(height, width)
        planes = np.concatenate([scan.targets[:, index], scan.ignored[None, index]])
        image, planes, t1 = augment_crop(rng, image, planes, centre, size, real=scan.real, t1=t1)
        target, ignored = planes[:-1], planes[-1] >= 0.5
        target[self.structures.index("wmh"), ignored] = np.nan
        if t1 is not None:
            t1 = augment_t1(rng.spawn(1)[0], t1)
        return Sample(image, target, scan.valid, t1)

    @cached_property
    def _label_maps(self) -> list[Path]:
        if not self.config.labelmaps:
            return []
        folder = self.config.path(self.config.labelmaps)
        sources = sorted(folder.glob("*.nii.gz"))
        if not sources:
            raise DataError(f"{folder}: no label map (*.nii.gz) there.")
        return sources

    @cached_property
    def _anatomies(self) -> list[Path]:
        """Registered whole heads, as files: workers load the one that they need."""
        return [kept_head(Path(self.config.cache), source) for source in self._label_maps]

    @cached_property
    def _real_anatomies(self) -> dict[Path, Path]:
        """Files of what real scans show, by scan, of those that lesions can be painted into."""
        cache = Path(self.config.cache)
        kept = {
            files.image: kept_scan(cache, files.image, files.masks) for files in self._real_files
        }
        return {image: path for image, path in kept.items() if path is not None}

    @cached_property
    def _bank(self) -> MaskBank | None:
        if not self.config.lesion_masks:
            return None
        return MaskBank.read(self.config.path(self.config.lesion_masks), self.config.exclude_masks)

    @cached_property
    def _real_files(self) -> list[_Files]:
        """Files of every real scan; they are read when a lane comes to them."""
        if not self.config.real_lanes:
            return []
        if self.config.manifest:
            part = read_labelled(self.config, "train", verify=True)
            return [
                _Files(
                    part.manifest.file(scan.image),
                    part.masks(scan),
                    part.t1(scan) if self.t1_channels else None,
                )
                for scan in part.scans
            ]
        return [
            _Files(image, masks, bids_t1(image) if self.t1_channels else None)
            for root in map(self.config.path, self.config.real)
            for image, masks in labelled_scans(root)
        ]


def _shown_t1(t1: Volume, prepared: Prepared, flair: Volume, *, real: bool) -> FloatArray | None:
    """Bring a T1 to the grid of its FLAIR; None for a synthetic one of which that cannot be."""
    try:
        return prepare_t1(t1, prepared, flair)
    except (DataError, GridMismatchError):
        if real:
            raise
        return None  # a field of view cut at random may hold too little of the head


def possible_caps(
    prepared: Prepared, ventricles: FloatArray, reach_mm: float
) -> npt.NDArray[np.bool_]:
    """Mark what is brighter than white matter within a distance of the ventricles.

    Some readers leave caps and bands out as normal for age, others outline them: where they do not
    say, neither should be taught.

    Parameters
    ----------
    prepared
        The scan, S slices of H x W pixels.
    ventricles
        (S, H, W) on its grid, in [0, 1].
    reach_mm
        Distance within the slice.

    Returns
    -------
    array (S, H, W) bool
    """
    bright = prepared.slices > _CAP_CONTRAST * WHITE_MATTER_LEVEL
    near = np.zeros_like(bright)
    for index, plane in enumerate(ventricles > 0.5):
        if plane.any():
            distance_px = ndimage.distance_transform_edt(~plane)
            near[index] = distance_px * prepared.config.pixel_size_mm <= reach_mm
    return near & bright


def build_stream(
    table: Mapping[str, Any],
    seed: int,
    crop: int,
    preprocess_config: PreprocessConfig,
    structures: tuple[str, ...],
    samples_per_step: int = 1,
    cache: Path = Path("cache"),
    *,
    in_channels: int = 3,
    t1_channels: int = 0,
) -> TrainingStream | SliceStream:
    """Make the stream that the ``[data]`` table of a training file describes, sources checked.

    Parameters
    ----------
    table
        Settings, see `DataConfig`.
    seed, crop, preprocess_config, structures
        See `TrainingStream` and `SliceStream`.
    samples_per_step
        Epochs are whole multiples of it.
    cache
        Folder for preprocessed scans, unless ``table`` names one.
    in_channels, t1_channels
        Slices of FLAIR and of T1 in a sample.
    """
    config = from_dict(DataConfig, table)
    common = (config, seed, crop, preprocess_config, structures)
    stream: TrainingStream | SliceStream
    if config.real_alone:
        stream = SliceStream(
            *common, samples_per_step, cache, in_channels=in_channels, t1_channels=t1_channels
        )
    else:
        stream = TrainingStream(*common, in_channels=in_channels, t1_channels=t1_channels)
    stream.prepare()
    return stream
