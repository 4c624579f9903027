"""Lesions painted into real scans.

Labels of real scans are few, and say least of small lesions and of large loads. What is painted is
known, and everything around it is a scanner's own: noise, texture, partial volume, artefacts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.anatomy import FIELD_STEP_MM, Tissue, mni_anatomy, register_anatomy
from wmh_lora.data.fields import FloatArray, log_uniform, upsample
from wmh_lora.data.painting import faintest_excess, shade_lesions
from wmh_lora.data.synthesis import IGNORED, LESION_SHARE, Case
from wmh_lora.data.visibility import judge_visibility
from wmh_lora.files import open_atomic
from wmh_lora.structures import bounding_box
from wmh_lora.volume import Volume

__all__ = ["RealAnatomy", "paint_lesions", "real_anatomy"]

BoolArray = npt.NDArray[np.bool_]
LabelArray = npt.NDArray[np.uint8]

_SMOOTH_MM = 1.5
_LESION_SMOOTH_MM = 0.8
_AROUND_MM = 50.0  # of which white matter's brightness is averaged: coil shading is slower
_WHITE = 0.1  # share by which white matter differs from its own brightness around
_FLUID = 0.65  # of white matter's brightness: less is fluid
_SURFACE_MM = 3.0  # of the brain, which holds cortex alone
_LEAST_WHITE_ML = 50.0
_LEAST_LESION = 20  # voxels, of which a scan's own contrast is measured
_CONTRAST = (0.25, 0.9)
_OWN_CONTRAST = (0.22, 1.2)
_STEP_MM = 1.0  # between samples across a slice

_OTHER_BRAIN = (
    Tissue.DEEP_GREY,
    Tissue.PALLIDUM,
    Tissue.LIMBIC,
    Tissue.BRAINSTEM,
    Tissue.CEREBELLAR_CORTEX,
    Tissue.CEREBELLAR_WHITE,
)
"""What FLAIR does not tell from white matter or cortex: laid in from the template."""


@dataclass(frozen=True)
class RealAnatomy:
    """What a scan shows, as far as lesions need to know.

    Attributes
    ----------
    tissue
        (X, Y, Z) uint8 of `Tissue`, 1 mm, axes to the right, anterior and superior.
    to_mni_mm
        (3, x, y, z) coarse field to MNI152 millimetres over the same extent.
    from_box
        (4, 4) voxels of the scan, from the first corner of ``box`` on, to voxels of ``tissue``.
    box
        Voxels of the scan that hold its brain.
    """

    tissue: LabelArray
    to_mni_mm: FloatArray
    from_box: npt.NDArray[np.float64]
    box: tuple[slice, slice, slice]

    def save(self, path: Path) -> None:
        """Write to an ``.npz`` file."""
        box = [(side.start, side.stop) for side in self.box]
        with open_atomic(path, overwrite=True) as stream:
            np.savez_compressed(
                stream,
                tissue=self.tissue,
                to_mni_mm=self.to_mni_mm,
                from_box=self.from_box,
                box=box,
            )

    @classmethod
    def load(cls, path: Path) -> RealAnatomy:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            i, j, k = (slice(int(start), int(stop)) for start, stop in stored["box"])
            return cls(stored["tissue"], stored["to_mni_mm"], stored["from_box"], (i, j, k))


def real_anatomy(case: Case) -> RealAnatomy | None:
    """Tell the tissues of a scan by brightness, and bring its brain and ventricles onto MNI152.

    Returns
    -------
    RealAnatomy or None
        None where brain or ventricles are not labelled, or hardly any white matter is told.
    """
    if not {"wmh", "brain", "ventricles"} <= case.masks.keys():
        return None
    box = bounding_box(case.masks["brain"])
    if box is None or not case.masks["ventricles"].any():
        return None
    case = _cropped(case, box)
    image, solid = _smoothed(case), _solid(case)
    white, level = _white_matter(case, image, solid)
    if np.count_nonzero(white) * case.volume.voxel_volume_ml < _LEAST_WHITE_ML:
        return None
    from_box, shape = _millimetre_grid(case.volume)
    to_box = np.linalg.inv(from_box)

    def laid(mask: BoolArray) -> BoolArray:
        sampled = ndimage.affine_transform(
            mask.astype(np.float32), to_box[:3, :3], to_box[:3, 3], shape, order=1, mode="nearest"
        )
        return np.asarray(sampled > 0.5)

    tissue = np.zeros(shape, np.uint8)
    for mask, name in (
        (case.masks["brain"] > 0.5, Tissue.CORTEX),
        (white | _marked(case), Tissue.WHITE_MATTER),
        (solid & (image < _FLUID * level), Tissue.CSF),
        (case.masks["ventricles"] > 0.5, Tissue.VENTRICLE),
    ):
        tissue[laid(mask)] = name
    to_mni_mm = _corner_to_corner(register_anatomy(tissue), tissue.shape)
    _lay_in_template(tissue, to_mni_mm)
    return RealAnatomy(tissue, to_mni_mm, from_box, box)


def paint_lesions(
    rng: np.random.Generator, case: Case, anatomy: RealAnatomy, lesions: FloatArray
) -> Case:
    """Paint lesions into a real scan as synthetic scans have them.

    They are about as bright as the scan's own, where it has some, and leave those as they are.

    Parameters
    ----------
    rng
        Source of randomness.
    case
        A scan with masks of brain, ventricles and lesions.
    anatomy
        Of this scan.
    lesions
        (X, Y, Z) 0 or 1, on the grid of the anatomy.

    Returns
    -------
    Case
        With changed volume and ``wmh``; what of the painted is too faint to tell is `IGNORED`.
    """
    if not lesions.any():
        return case
    inner = _cropped(case, anatomy.box)
    smooth, solid, own = _smoothed(inner), _solid(inner), inner.masks["wmh"] > 0.5
    white, level = _white_matter(inner, smooth, solid)
    typical = _typical_excess(rng, inner, level)
    excess, profile = shade_lesions(rng, lesions, typical)
    seen = (profile > 0.5) & (excess > faintest_excess(typical))
    share, rise, covered = (
        _averaged(part, anatomy.from_box, inner.volume)
        for part in (profile, profile * excess, seen)
    )
    free = solid & ~_marked(inner)
    # a lesion takes the place of tissue: in cortex it is no brighter than in white matter
    change = np.maximum(level * (share + rise) - share * smooth, 0.0)
    image = (inner.volume.data + np.where(free, change, 0.0)).astype(np.float32)
    painted = free & (covered > LESION_SHARE)
    visible, doubtful = judge_visibility(image, painted | own, white, inner.volume.spacing_mm)
    data = case.volume.data.copy()
    data[anatomy.box] = image
    masks = dict(case.masks)
    for name, more in (("wmh", visible), (IGNORED, doubtful)):
        masks[name] = masks[name].copy() if name in masks else np.zeros_like(data)
        masks[name][anatomy.box][more & painted] = 1.0
    return replace(case, volume=replace(case.volume, data=data), masks=masks)


def _cropped(case: Case, box: tuple[slice, slice, slice]) -> Case:
    affine = np.array(case.volume.affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ [side.start for side in box]
    volume = Volume(case.volume.data[box], affine)
    return Case(volume, {name: mask[box] for name, mask in case.masks.items()})


def _marked(case: Case) -> BoolArray:
    """Return (I, J, K) what somebody or something has called a lesion, or possibly one."""
    marked = case.masks["wmh"] > 0.5
    return marked | (case.masks[IGNORED] > 0.5) if IGNORED in case.masks else marked


def _solid(case: Case) -> BoolArray:
    return np.asarray((case.masks["brain"] > 0.5) & (case.masks["ventricles"] < 0.5))


def _slice_sigma(case: Case, sigma_mm: float) -> list[float]:
    """Return standard deviations in voxels, none across slices."""
    spacing_mm = case.volume.spacing_mm
    through = int(np.argmax(spacing_mm))
    return [0.0 if a == through else sigma_mm / s for a, s in enumerate(spacing_mm)]


def _smoothed(case: Case) -> FloatArray:
    sigma = _slice_sigma(case, _SMOOTH_MM)
    return np.asarray(ndimage.gaussian_filter(case.volume.data, sigma), dtype=np.float32)


def _white_matter(case: Case, image: FloatArray, solid: BoolArray) -> tuple[BoolArray, FloatArray]:
    """Find normal white matter, (I, J, K), and how bright it is at every voxel.

    ``image`` is the smoothed scan.
    """
    spacing_mm = case.volume.spacing_mm
    deep = solid & (ndimage.distance_transform_edt(solid, spacing_mm) > _SURFACE_MM)
    deep &= ~_marked(case)
    if not deep.any():
        return deep, np.zeros_like(image)
    counts, edges = np.histogram(image[deep], 128)
    smooth_counts = ndimage.gaussian_filter1d(counts.astype(np.float64), 2.0)
    mode = float(edges[int(np.argmax(smooth_counts)) + 1])
    level = np.full_like(image, mode)
    white = deep
    size = [max(1, round(_AROUND_MM / s)) for s in spacing_mm]
    for allowed in (3 * _WHITE, 2 * _WHITE, _WHITE):
        white = deep & (np.abs(image - level) < allowed * level)
        share = ndimage.uniform_filter(white.astype(np.float32), size)
        around = ndimage.uniform_filter(np.where(white, image, 0.0), size)
        level = np.where(share > 0.01, around / np.maximum(share, 0.01), mode).astype(np.float32)
    return white, level


def _typical_excess(rng: np.random.Generator, case: Case, level: FloatArray) -> float:
    lesion = case.masks["wmh"] > 0.5
    typical = log_uniform(rng, *_CONTRAST)
    if np.count_nonzero(lesion) < _LEAST_LESION:
        return typical
    image = ndimage.gaussian_filter(case.volume.data, _slice_sigma(case, _LESION_SMOOTH_MM))
    own = np.median(image[lesion] / np.maximum(level[lesion], 1e-6)) - 1.0
    # borders, where lesions are less bright, are half of a median
    return float(np.clip(own * np.exp(rng.normal(0.1, 0.3)), *_OWN_CONTRAST))


def _millimetre_grid(volume: Volume) -> tuple[npt.NDArray[np.float64], tuple[int, int, int]]:
    """Lay a grid of 1 mm, right, anterior and superior, around a scan."""
    ends = [(-0.5, n - 0.5) for n in volume.shape]
    corners = np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
    from_box = np.array(volume.affine, dtype=np.float64)
    corners_mm = from_box[:3, :3] @ corners + from_box[:3, 3:]
    origin_mm = np.floor(corners_mm.min(axis=1)) - 2.0
    x, y, z = (np.ceil(corners_mm.max(axis=1)) + 3.0 - origin_mm).astype(int)
    from_box[:3, 3] -= origin_mm
    return from_box, (int(x), int(y), int(z))


def _averaged(
    part: npt.NDArray[np.generic], from_box: npt.NDArray[np.float64], volume: Volume
) -> FloatArray:
    """Average a map of 1 mm over the thickness of the scan's slices: (I, J, K)."""
    spacing_mm = volume.spacing_mm
    through = int(np.argmax(spacing_mm))
    steps = max(1, round(spacing_mm[through] / _STEP_MM))
    mean = np.zeros(volume.shape, np.float32)
    for step in range(steps):
        offset = np.zeros(3)
        offset[through] = (step + 0.5) / steps - 0.5
        start = from_box[:3, 3] + from_box[:3, :3] @ offset
        mean += ndimage.affine_transform(
            part.astype(np.float32), from_box[:3, :3], start, volume.shape, order=1
        )
    return np.asarray(mean / steps, dtype=np.float32)


def _corner_to_corner(field: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Give a field with nodes at every eighth voxel nodes from the first voxel to the last."""
    axes = [np.linspace(0.0, n - 1.0, int(np.ceil((n - 1) / FIELD_STEP_MM)) + 1) for n in shape]
    nodes = np.stack(np.meshgrid(*axes, indexing="ij")) / FIELD_STEP_MM
    moved = [ndimage.map_coordinates(c, nodes, order=1) for c in field]
    return np.stack(moved).astype(np.float32)


def _lay_in_template(tissue: LabelArray, to_mni_mm: FloatArray) -> None:
    """Give nuclei, brain stem and cerebellum the template's labels."""
    template = mni_anatomy()
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    origin_mm = template.to_mni_mm[:, 0, 0, 0]
    where = [upsample(mm - start, shape) for mm, start in zip(to_mni_mm, origin_mm)]
    expected = ndimage.map_coordinates(template.tissue, np.stack(where), order=0)
    solid = np.isin(tissue, (Tissue.WHITE_MATTER, Tissue.CORTEX))
    laid_in = solid & np.isin(expected, _OTHER_BRAIN)
    tissue[laid_in] = expected[laid_in]
