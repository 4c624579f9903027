"""What training samples are and where they come from: settings, samples, labelled scans."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wmh_lora.data.fields import FloatArray
from wmh_lora.data.manifest import Manifest, Scan, read_manifest
from wmh_lora.data.split import Part, Split, read_split
from wmh_lora.data.synthesis import IGNORED, Case
from wmh_lora.errors import ConfigError, DataError, GridMismatchError
from wmh_lora.evaluation.masks import OTHER_PATHOLOGY_LABEL
from wmh_lora.volume import Volume, grid_difference

__all__ = [
    "DataConfig",
    "LabelledScans",
    "Sample",
    "read_labelled",
    "read_masks",
]
__all__ += ["relative_to_root", "require_t1"]


@dataclass(frozen=True)
class DataConfig:
    """Where training samples come from: labelled scans, synthetic ones, or both.

    Attributes
    ----------
    root
        Folder that the other paths start from, ``cache`` apart.
    manifest, split, fold
        Files of ``wmh-lora data prepare`` and ``data split``, and the division in it if there are
        several. The train part is trained on, the validation part validates.
    background_share
        Fraction of the slices without lesions that an epoch shows; which ones changes.
    labelmaps
        Folder of whole-head label maps; empty for the packaged MNI152 anatomy alone.
    lesion_masks
        Folder of lesion masks in MNI152 space; empty for vascular patterns alone.
    exclude_masks
        Subjects whose mask must not be seen, such as those of a validation scan.
    real
        BIDS folders of labelled scans (``derivatives/manual`` holds the masks), in place of a
        manifest; every scan is as likely to be drawn. They need ``real_lanes``.
    cache
        Folder for anatomies once registered, and for scans once preprocessed; the latter go to
        ``cache`` in the run's folder by default. It starts from the working folder.
    mni_share
        Fraction of synthetic scans painted on the MNI152 anatomy.
    lanes, real_lanes
        Scans held at a time, and how many of them are real. A manifest with no real lanes is
        trained on alone, without synthetic scans.
    crops_per_scan
        Crops taken before a lane moves to its next scan.
    lesion_share
        Fraction of crops placed around a lesion, where there is one.
    extracted_share
        Fraction of the real scans with a labelled brain that are shown without the rest of the
        head, where synthetic ones are mixed in.
    painted_share
        Fraction of the real scans, where synthetic ones are mixed in, that get lesions painted in
        beside their own (`wmh_lora.data.real_painting`), if brain and ventricles are labelled.
    min_excess
        Synthetic scans whose lesions are brighter than white matter by a smaller share (median over
        their pixels) are drawn again, a few times: contrast, noise and clipping now and then leave
        nothing of the lesions to see. Real ones measured 0.37 to 0.70. 0 takes every scan.
    other_planes_share
        Fraction of the scans with equal voxel sizes that are shown in coronal or sagittal slices,
        for models that look at such scans in all three planes.
    cap_reach_mm
        Distance from the labelled ventricles of real scans within which bright pixels that are not
        labelled are ignored where the scan is shown without the rest of the head: for masks that
        leave normal caps and bands out, which is to be learned of whole scans of their scanner, and
        not of all scans. 0 ignores none.
    """

    root: str = ""
    manifest: str = ""
    split: str = ""
    fold: str = ""
    background_share: float = 0.08
    labelmaps: str = ""
    lesion_masks: str = ""
    exclude_masks: tuple[str, ...] = ()
    real: tuple[str, ...] = ()
    cache: str = ""
    mni_share: float = 0.12
    lanes: int = 8
    real_lanes: int = 0
    crops_per_scan: int = 24
    lesion_share: float = 0.7
    extracted_share: float = 0.5
    painted_share: float = 0.0
    min_excess: float = 0.0
    other_planes_share: float = 0.0
    cap_reach_mm: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.real_lanes <= self.lanes or self.lanes < 1:
            raise ConfigError(
                f"data.real_lanes = {self.real_lanes} must lie between 0 and data.lanes = "
                f"{self.lanes}."
            )
        shares = ("background_share", "mni_share", "lesion_share", "extracted_share")
        for name in (*shares, "painted_share", "other_planes_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} = {getattr(self, name)} must lie in [0, 1].")
        for name, least in (("crops_per_scan", 1), ("min_excess", 0), ("cap_reach_mm", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"data.{name} = {getattr(self, name)} must be at least {least}.")
        if bool(self.manifest) != bool(self.split):
            raise ConfigError(
                "data.manifest and data.split belong together: name the files of `wmh-lora data "
                "prepare` and `wmh-lora data split`."
            )
        if self.manifest and self.real:
            raise ConfigError("data.manifest and data.real both name labelled scans; keep one.")
        if self.real and not self.real_lanes:
            raise ConfigError(
                "data.real names labelled scans, but with data.real_lanes = 0 none is shown; set "
                "data.real_lanes above 0, or data.real = [] to train on synthetic scans alone."
            )
        if self.real_lanes and not (self.real or self.manifest):
            raise ConfigError(
                "data.real_lanes asks for real scans but neither data.manifest nor data.real names "
                "any."
            )
        for name in ("labelmaps", "painted_share"):
            if getattr(self, name) and not self.cache and not self.real_alone:
                raise ConfigError(f"data.{name} needs data.cache, a folder for anatomies.")

    @property
    def real_alone(self) -> bool:
        """Whether the slices of a manifest are all that is trained on."""
        return bool(self.manifest) and self.real_lanes == 0

    def path(self, path: str) -> Path:
        """Return where a file or folder named in the settings lies."""
        return Path(self.root).expanduser() / path


@dataclass(frozen=True)
class Sample:
    """One crop of several structures.

    Attributes
    ----------
    image
        (in_channels, h, w) float32 in [0, 1].
    target
        (n, h, w) float32 in [0, 1]; NaN in pixels that are neither the structure nor background.
    valid
        (n,), which structures are labelled.
    t1
        (t1_channels, h, w) float32 in [0, 1]; None where the scan has no T1.
    """

    image: FloatArray
    target: FloatArray
    valid: npt.NDArray[np.bool_]
    t1: FloatArray | None = None


@dataclass(frozen=True)
class LabelledScans:
    """Scans of one part of a split.

    Attributes
    ----------
    manifest, split
        Where they come from.
    scans
        Of this part, usable ones only.
    """

    manifest: Manifest
    split: Split
    scans: tuple[Scan, ...]

    def files(self, *, t1: bool = False) -> list[Path]:
        """List the images and the masks, and the T1 scans that can be used if they are."""
        paths = []
        for scan in self.scans:
            paths += [scan.image, scan.mask, *scan.structures.values()]
            paths += [scan.usable_t1] if t1 and scan.usable_t1 else []
        return [self.manifest.file(path) for path in paths]

    def masks(self, scan: Scan) -> list[tuple[str, Path]]:
        """List the structures that are labelled in a scan, with their masks."""
        paths = {"wmh": scan.mask, **scan.structures}
        return [(name, self.manifest.file(path)) for name, path in paths.items()]

    def t1(self, scan: Scan) -> Path | None:
        """Return where the T1 of a scan lies, if it has one that can be used."""
        return self.manifest.file(scan.usable_t1) if scan.usable_t1 else None


def read_labelled(config: DataConfig, part: Part, *, verify: bool = False) -> LabelledScans:
    """Read which scans a part of the split holds.

    Parameters
    ----------
    config
        Names the manifest, the split and the fold.
    part
        ``train``, ``validation`` or ``test``.
    verify
        Hash every file of the manifest again; the error names all that have changed.

    Raises
    ------
    ConfigError
        There is no such fold.
    DataError
        Manifest or split cannot be read or do not fit each other, files have changed, or the
        training part is empty.
    """
    manifest = read_manifest(config.path(config.manifest), verify=verify)
    split = read_split(config.path(config.split), manifest).split(config.fold or None)
    subjects = set(split.part(part))
    scans = tuple(scan for scan in manifest.usable if scan.subject in subjects)
    if not scans and part == "train":
        raise DataError(
            f"The training part of {split.name} in {config.path(config.split)} holds no usable "
            "scan; `wmh-lora data prepare` tells what is wrong with the scans."
        )
    return LabelledScans(manifest, split, scans)


def require_t1(t1_channels: int, scans_with_t1: int) -> None:
    """Raise ConfigError if a model is to learn about T1 and no scan shows it any."""
    if t1_channels and not scans_with_t1:
        raise ConfigError(
            f"model.t1_channels = {t1_channels}, but no training scan has a T1 that can be used. "
            "Set model.t1_channels = 0, or give the scans their T1 (`wmh-lora data prepare` tells "
            "how many have one)."
        )


def read_masks(image: Path, masks: Iterable[tuple[str, Path]]) -> Case:
    """Read a scan with its masks; label 2 in that of the lesions is `IGNORED`.

    Parameters
    ----------
    image
        FLAIR; NaN and infinity in it are read as 0.
    masks
        Structure and file. Any value above 0 is inside, but 2 in ``wmh`` is other pathology.

    Raises
    ------
    GridMismatchError
        A mask does not lie on the grid of the image.
    """
    volume = Volume.read(image)
    read: dict[str, FloatArray] = {}
    files = [image]
    for name, path in masks:
        mask = Volume.read(path, allow_constant=True)
        if difference := grid_difference(volume, mask):
            raise GridMismatchError(
                f"{image} and its mask {path}: {difference}; resample the mask to the grid of the "
                "image."
            )
        read[name] = (mask.data > 0).astype(np.float32)
        if name == "wmh":
            read[IGNORED] = (np.rint(mask.data) == OTHER_PATHOLOGY_LABEL).astype(np.float32)
            read[name] -= read[IGNORED]
        files.append(path)
    return Case(replace(volume, data=volume.finite_data()), read, tuple(files))


def relative_to_root(path: Path, config: DataConfig) -> str:
    """Name of a file as a path from ``config.root``, with forward slashes."""
    try:
        return Path(os.path.relpath(path.resolve(), config.path("").resolve())).as_posix()
    except ValueError:  # another drive, on Windows
        return path.resolve().as_posix()
