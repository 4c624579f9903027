"""Where white matter hyperintensities lie: shapes for synthetic scans.

Real masks (multiple sclerosis, drawn in MNI space) are laid into the anatomy and varied; vascular
patterns follow STRIVE-2's descriptions: caps and bands along the ventricles that grow into
confluent haloes, and punctate foci in deep and juxtacortical white matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from nibabel.affines import apply_affine
from scipy import ndimage

from wmh_lora.data.anatomy import Tissue
from wmh_lora.data.fields import (
    FloatArray,
    fill_between,
    log_uniform,
    smooth_field,
    uniform,
    upsample,
)
from wmh_lora.errors import DataError
from wmh_lora.volume import Volume, grid_difference

LabelArray = npt.NDArray[np.uint8]

BAND_MINIMUM_MM = 2.0
"""Thinner periventricular rims are a normal finding and stay unlabelled."""

_HOSTS = (
    Tissue.WHITE_MATTER,
    Tissue.DEEP_GREY,
    Tissue.PALLIDUM,
    Tissue.BRAINSTEM,
    Tissue.CEREBELLAR_WHITE,
)


@dataclass(frozen=True)
class MaskBank:
    """Real lesion masks in MNI152 space.

    Attributes
    ----------
    masks
        Each (X, Y, Z) bool on the same 1 mm grid.
    from_mm
        (4, 4) millimetres to voxels of that grid.
    """

    masks: tuple[npt.NDArray[np.bool_], ...]
    from_mm: npt.NDArray[np.float64]

    @classmethod
    def read(cls, folder: Path, exclude: tuple[str, ...] = ()) -> MaskBank:
        """Read the masks of a folder, see :meth:`paths` and :meth:`read_files`."""
        return cls.read_files(cls.paths(folder, exclude))

    @classmethod
    def read_files(cls, paths: Sequence[Path]) -> MaskBank:
        """Read masks; DataError if one cannot be read, or does not lie on the grid of the first."""
        first = Volume.read(paths[0], allow_constant=True)
        masks = [first.data > 0]
        for path in paths[1:]:
            mask = Volume.read(path, allow_constant=True)
            if difference := grid_difference(first, mask):
                raise DataError(
                    f"{path} does not lie on the grid of {paths[0]}: {difference}; lesion masks "
                    "need one grid in MNI152 space, resample it or leave it out."
                )
            masks.append(mask.data > 0)
        return cls(tuple(masks), np.asarray(np.linalg.inv(first.affine), dtype=np.float64))

    @staticmethod
    def paths(folder: Path, exclude: tuple[str, ...] = ()) -> list[Path]:
        """List every ``*_mask.nii.gz`` of a folder but those of the subjects excluded by name.

        DataError if none is left, or there is no mask of a subject that is excluded.
        """
        subjects = {p: p.name.split("_")[0] for p in sorted(folder.glob("*_mask.nii.gz"))}
        kept = [path for path, subject in subjects.items() if subject not in exclude]
        if not kept:
            raise DataError(f"{folder}: no lesion mask (*_mask.nii.gz) to read there.")
        if unknown := sorted(set(exclude) - set(subjects.values())):
            raise DataError(
                f"{folder}: there is no lesion mask of {', '.join(unknown)} to exclude; give what "
                f"file names have before the first underscore, such as {subjects[kept[0]]}."
            )
        return kept

    def draw(
        self, rng: np.random.Generator, to_mni_mm: FloatArray, shape: tuple[int, int, int]
    ) -> FloatArray:
        """Lay one varied mask into an anatomy.

        Parameters
        ----------
        rng
            Source of randomness.
        to_mni_mm
            (3, x, y, z) coarse field over the target grid.
        shape
            (X, Y, Z) of the target grid.

        Returns
        -------
        array (X, Y, Z) float32
            Mask before any restriction to tissue, in [0, 1]; dilated or thinned at random.
        """
        mask = self.masks[rng.integers(len(self.masks))]
        if rng.random() < 0.45:
            mask = mask | self.masks[rng.integers(len(self.masks))]
        if rng.random() < 0.5:
            mask = mask[::-1]  # the grid is symmetric about the midline
        coarse_mm = to_mni_mm.reshape(3, -1).T
        voxels = apply_affine(self.from_mm, coarse_mm).T.reshape(to_mni_mm.shape)
        voxels = voxels + rng.normal(0.0, 1.5, (3, 1, 1, 1))
        soft = ndimage.gaussian_filter(mask.astype(np.float32), uniform(rng, 0.4, 0.9))
        where = np.stack([upsample(v.astype(np.float32), shape) for v in voxels])
        sampled = ndimage.map_coordinates(soft, where, order=1, output=np.float32)
        level = uniform(rng, 0.25, 0.65)
        return np.asarray(sampled > level, dtype=np.float32)


def ventricle_distance(tissue: LabelArray) -> FloatArray:
    """Return each voxel's distance to the ventricles in mm (1 mm grid), computed on a 2 mm grid."""
    coarse = tissue[::2, ::2, ::2] == Tissue.VENTRICLE
    if not coarse.any():
        return np.full(tissue.shape, 100.0, dtype=np.float32)
    distance = 2.0 * ndimage.distance_transform_edt(~coarse).astype(np.float32)
    x, y, z = tissue.shape
    return fill_between(distance, (x, y, z))


def periventricular(
    rng: np.random.Generator, distance_mm: FloatArray, tissue: LabelArray
) -> FloatArray:
    """Draw caps, bands and haloes of uneven depth around the ventricles."""
    shape = tissue.shape
    mean_mm = log_uniform(rng, 1.5, 14.0)
    depth = mean_mm * (1.0 + 0.6 * smooth_field(rng, shape, uniform(rng, 12.0, 30.0)))
    depth += uniform(rng, 0.0, 0.5) * mean_mm * smooth_field(rng, shape, uniform(rng, 4.0, 8.0))
    depth += _horn_bonus(rng, tissue)
    band = (distance_mm < depth) & (depth > BAND_MINIMUM_MM)
    # coarse distances overshoot by a millimetre inside the ventricle's own wall; tissue decides
    return np.asarray(band & (tissue == Tissue.WHITE_MATTER), dtype=np.float32)


def confluent(rng: np.random.Generator, distance_mm: FloatArray, tissue: LabelArray) -> FloatArray:
    """Draw patches of deep white matter that run together, more likely near the ventricles."""
    shape = tissue.shape
    likely = smooth_field(rng, shape, uniform(rng, 9.0, 22.0))
    likely += uniform(rng, 0.2, 0.7) * smooth_field(rng, shape, uniform(rng, 3.0, 6.0))
    likely -= np.abs(distance_mm - uniform(rng, 3.0, 14.0)) / uniform(rng, 6.0, 20.0)
    white = tissue == Tissue.WHITE_MATTER
    if not white.any():
        return np.zeros(shape, dtype=np.float32)
    share = log_uniform(rng, 0.003, 0.2)
    level = np.quantile(likely[white][::16], 1.0 - share)
    return np.asarray(white & (likely > level), dtype=np.float32)


def _horn_bonus(rng: np.random.Generator, tissue: LabelArray) -> FloatArray:
    """Return extra depth in mm at the front and back ends of the ventricles, where caps sit."""
    present = np.flatnonzero((tissue == Tissue.VENTRICLE).any(axis=(0, 2)))
    y = np.arange(tissue.shape[1], dtype=np.float32)
    bonus = np.zeros_like(y)
    if present.size:
        for end in (present[0], present[-1]):
            size = uniform(rng, 0.0, 5.0) if rng.random() < 0.7 else 0.0
            bonus += size * np.exp(-(((y - end) / uniform(rng, 6.0, 16.0)) ** 2))
    return bonus[None, :, None]


def punctate(rng: np.random.Generator, distance_mm: FloatArray, tissue: LabelArray) -> FloatArray:
    """Draw separate foci, in white matter mostly: ellipsoids with uneven borders.

    Their longest diameter is 2.5 to 15 mm, 6 mm in the median.
    """
    mask = np.zeros(tissue.shape, dtype=np.float32)
    count = int(log_uniform(rng, 1.0, 60.0))
    deep = rng.random() < 0.85
    hosts = np.flatnonzero(
        (tissue == Tissue.WHITE_MATTER).ravel() if deep else np.isin(tissue, _HOSTS).ravel()
    )
    if hosts.size == 0:
        return mask
    typical_mm = log_uniform(rng, 1.2, 3.5)
    for flat in rng.choice(hosts, size=count):
        centre = np.array(np.unravel_index(flat, tissue.shape))
        near = distance_mm[tuple(centre)] < 12.0
        radii = typical_mm * np.exp(rng.normal(0.15 if near else 0.0, 0.35, 3))
        radii = np.clip(radii, 0.9, 9.0)
        reach = int(np.ceil(radii.max() * 1.6)) + 1
        low = np.maximum(centre - reach, 0)
        high = np.minimum(centre + reach + 1, tissue.shape)
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"))
        rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        offset = np.tensordot(rotation, grid - centre[:, None, None, None], axes=1)
        radius = np.sqrt(np.sum((offset / radii[:, None, None, None]) ** 2, axis=0))
        size = (grid.shape[1], grid.shape[2], grid.shape[3])
        wobble = 1.0 + 0.25 * smooth_field(rng, size, 3.0)
        mask[box] = np.maximum(mask[box], (radius < wobble).astype(np.float32))
    return mask * np.isin(tissue, _HOSTS)


def draw_lesions(
    rng: np.random.Generator,
    tissue: LabelArray,
    to_mni_mm: FloatArray,
    distance_mm: FloatArray,
    bank: MaskBank | None,
) -> FloatArray:
    """Draw one subject's lesions.

    Parameters
    ----------
    rng
        Source of randomness.
    tissue
        (X, Y, Z) tissue labels, 1 mm.
    to_mni_mm
        (3, x, y, z) coarse field to MNI millimetres over the same extent.
    distance_mm
        (X, Y, Z) distance to the ventricles.
    bank
        Real masks, or None for vascular patterns alone.

    Returns
    -------
    array (X, Y, Z) float32
        0 or 1; empty in about one subject of twelve.
    """
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    mask = np.zeros(shape, dtype=np.float32)
    kind = rng.random()
    if kind < 0.08:
        return mask
    if bank is not None and kind < 0.60:
        drawn = bank.draw(rng, to_mni_mm, shape)
        mask = np.maximum(mask, within_hosts(drawn, tissue))
    if bank is None or kind > 0.48:
        if rng.random() < 0.75:
            mask = np.maximum(mask, periventricular(rng, distance_mm, tissue))
        if rng.random() < 0.75:
            mask = np.maximum(mask, punctate(rng, distance_mm, tissue))
        if rng.random() < 0.5:
            mask = np.maximum(mask, confluent(rng, distance_mm, tissue))
    return mask


def within_hosts(drawn: FloatArray, tissue: LabelArray) -> FloatArray:
    """Keep a drawn mask in white matter and nuclei, and where it reaches from there into cortex.

    A mask of one brain laid into another meets sulci; cortex that no white matter lesion touches
    would teach that bright cortex is a lesion.
    """
    mask = drawn * np.isin(tissue, _HOSTS)
    cortex = np.isin(tissue, (Tissue.CORTEX, Tissue.LIMBIC, Tissue.CEREBELLAR_CORTEX))
    reach = ndimage.binary_dilation(mask > 0, iterations=2) & cortex
    return np.asarray(np.maximum(mask, drawn * reach), dtype=np.float32)
