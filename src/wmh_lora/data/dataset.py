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
from typing import Any

import numpy as np
import numpy.typing as npt

from wmh_lora.config import PreprocessConfig, from_dict
from wmh_lora.data.anatomy import Anatomy, head_anatomy, mni_anatomy
from wmh_lora.data.augment import augment_crop, augment_scan
from wmh_lora.data.fields import FloatArray
from wmh_lora.data.lesions import MaskBank
from wmh_lora.data.synthesis import Case, synthesize
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.preprocess import Prepared, context_stack, preprocess, to_model_grid
from wmh_lora.volume import Volume


@dataclass(frozen=True)
class DataConfig:
    """Where training crops come from.

    Attributes
    ----------
    root
        Folder that the other paths start from.
    labelmaps
        Folder of whole-head label maps; empty for the packaged MNI152 anatomy alone.
    lesion_masks
        Folder of lesion masks in MNI152 space; empty for vascular patterns alone.
    exclude_masks
        Subjects whose mask must not be seen, such as those of a validation scan.
    real
        BIDS folder of labelled scans (``derivatives/manual`` holds the masks); empty for none.
    cache
        Folder for anatomies once registered.
    mni_share
        Fraction of synthetic scans painted on the MNI152 anatomy.
    lanes, real_lanes
        Scans held at a time, and how many of them are real.
    crops_per_scan
        Crops taken before a lane moves to its next scan.
    lesion_share
        Fraction of crops placed around a lesion, where there is one.
    """

    root: str = ""
    labelmaps: str = ""
    lesion_masks: str = ""
    exclude_masks: tuple[str, ...] = ()
    real: str = ""
    cache: str = ""
    mni_share: float = 0.12
    lanes: int = 8
    real_lanes: int = 0
    crops_per_scan: int = 24
    lesion_share: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.real_lanes <= self.lanes or self.lanes < 1:
            raise ConfigError(
                f"data.real_lanes = {self.real_lanes} must lie between 0 and data.lanes = "
                f"{self.lanes}."
            )
        if self.real_lanes and not self.real:
            raise ConfigError("data.real_lanes asks for real scans but data.real names no folder.")
        if self.labelmaps and not self.cache:
            raise ConfigError("data.labelmaps needs data.cache, a folder for registered anatomies.")


@dataclass(frozen=True)
class Sample:
    """One crop: image (3, h, w), target (n, h, w), and which structures are labelled (n,)."""

    image: FloatArray
    target: FloatArray
    valid: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Scan:
    """A scan on the network's grid, with targets (n, S, H, W)."""

    prepared: Prepared
    targets: FloatArray
    valid: npt.NDArray[np.bool_]
    real: bool


class TrainingStream:
    """Makes sample ``i`` on demand.

    Parameters
    ----------
    config
        Sources and their shares.
    seed
        Of everything that is drawn.
    crop
        Side of the crops in pixels.
    preprocess_config
        The same as at inference.
    structures
        Order of the target's planes.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        crop: int,
        preprocess_config: PreprocessConfig,
        structures: tuple[str, ...],
    ) -> None:
        self.config = config
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
            folder = self._path(self.config.lesion_masks)
            paths += MaskBank.paths(folder, self.config.exclude_masks)
        for case in self._real_cases:
            paths += case.files
        return paths

    def prepare(self) -> None:
        """Read every source once, before workers start; registers anatomies where needed."""
        _ = self._anatomies, self._bank, self._real_cases

    def _scan(self, lane: int, number: int) -> _Scan:
        held = self._held.get(lane)
        if held is None or held[0] != number:
            rng = np.random.default_rng([self.seed, 0, lane, number])
            self._held[lane] = (number, self._make_scan(rng, lane))
        return self._held[lane][1]

    def _make_scan(self, rng: np.random.Generator, lane: int) -> _Scan:
        real = lane >= self.config.lanes - self.config.real_lanes
        if real:
            case = augment_scan(rng, self._real_cases[rng.integers(len(self._real_cases))])
        else:
            case = self._synthetic_case(rng)
        prepared = preprocess(case.volume, self.preprocess_config)
        zero = np.zeros(case.volume.shape, dtype=np.float32)
        targets = np.stack(
            [to_model_grid(case.masks.get(name, zero), prepared) for name in self.structures]
        )
        valid = np.array([name in case.masks for name in self.structures])
        return _Scan(prepared, targets, valid, real)

    def _synthetic_case(self, rng: np.random.Generator) -> Case:
        heads = self._anatomies
        if not heads or rng.random() < self.config.mni_share:
            return synthesize(rng, mni_anatomy(), self._bank)
        return synthesize(rng, Anatomy.load(heads[rng.integers(len(heads))]), self._bank)

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
        image = context_stack(scan.prepared, [index])[0]
        target = scan.targets[:, index]
        image, target = augment_crop(rng, image, target, centre, self.crop, real=scan.real)
        return Sample(image, target, scan.valid)

    @cached_property
    def _label_maps(self) -> list[Path]:
        if not self.config.labelmaps:
            return []
        folder = self._path(self.config.labelmaps)
        sources = sorted(folder.glob("*.nii.gz"))
        if not sources:
            raise DataError(f"{folder}: no label map (*.nii.gz) there.")
        return sources

    @cached_property
    def _anatomies(self) -> list[Path]:
        """Registered whole heads, as files: workers load the one that they need."""
        if not self._label_maps:
            return []
        cache = Path(self.config.cache)
        cache.mkdir(parents=True, exist_ok=True)
        files = []
        for source in self._label_maps:
            target = cache / (source.name.split(".")[0] + ".npz")
            if not target.exists():
                head_anatomy(source).save(target)
            files.append(target)
        return files

    @cached_property
    def _bank(self) -> MaskBank | None:
        if not self.config.lesion_masks:
            return None
        return MaskBank.read(self._path(self.config.lesion_masks), self.config.exclude_masks)

    @cached_property
    def _real_cases(self) -> list[Case]:
        if not self.config.real_lanes:
            return []
        root = self._path(self.config.real)
        images = sorted(root.glob("sub-*/anat/*_FLAIR.nii.gz"))
        if not images:
            raise DataError(f"{root}: no sub-*/anat/*_FLAIR.nii.gz there.")
        return [self._real_case(root, image) for image in images]

    def _real_case(self, root: Path, image: Path) -> Case:
        subject = image.name.split("_")[0]
        folder = root / "derivatives" / "manual" / subject / "anat"
        labels = {"wmh": "WMH", "ventricles": "ventricles", "brain": "brain"}
        masks, files = {}, [image]
        for name, label in labels.items():
            path = folder / f"{subject}_space-orig_label-{label}_mask.nii.gz"
            if path.exists():
                mask = Volume.read(path, allow_constant=True)
                masks[name] = (mask.data > 0).astype(np.float32)
                files.append(path)
        return Case(Volume.read(image), masks, tuple(files))

    def _path(self, path: str) -> Path:
        return Path(self.config.root).expanduser() / path


def build_stream(
    table: Mapping[str, Any],
    seed: int,
    crop: int,
    preprocess_config: PreprocessConfig,
    structures: tuple[str, ...],
) -> TrainingStream:
    """Make the stream that the ``[data]`` table of a training file describes, sources checked."""
    stream = TrainingStream(from_dict(DataConfig, table), seed, crop, preprocess_config, structures)
    stream.prepare()
    return stream
