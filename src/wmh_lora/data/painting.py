"""Give tissues FLAIR-like intensities (white matter is 1): contrast, texture, lesions, look-alikes.

Ranges are wide on purpose (domain randomisation, Billot et al., Med Image Anal 86:102789, 2023) but
keep what makes an image FLAIR: dark fluid, grey matter not darker than white, lesions brighter than
the tissue around them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.anatomy import Tissue
from wmh_lora.data.fields import (
    FloatArray,
    fill_between,
    log_uniform,
    smooth_field,
    tissue_variation,
    uniform,
    upsample,
)

LabelArray = npt.NDArray[np.uint8]

LESION_CONTRAST = (1.08, 2.2)
"""Brightness of lesions over the white matter around them, up to 0.3 more in single voxels; 1.3 to
1.75 is typical of real scans."""

TYPICAL_LESION_CONTRAST = 1.28
"""The lowest mean brightness of one subject's lesions; single ones reach the range's end."""

_MOST_DIRT_ALONE = 0.13
"""Excess brightness of patches that readers leave out where no lesions stand for comparison."""

_FEW_MM3 = 1000.0
"""Fewer lesions than that are no comparison."""

_FLUID = (Tissue.CSF, Tissue.VENTRICLE)


def paint(
    rng: np.random.Generator,
    tissue: LabelArray,
    lesions: FloatArray,
    distance_mm: FloatArray,
    to_mni_mm: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Paint one subject.

    Parameters
    ----------
    rng
        Source of randomness.
    tissue
        (X, Y, Z) tissue labels, 1 mm.
    lesions
        (X, Y, Z) lesion mask, 0 or 1.
    distance_mm
        (X, Y, Z) distance to the ventricles.
    to_mni_mm
        (3, x, y, z) coarse field to MNI millimetres over the same extent.

    Returns
    -------
    image : array (X, Y, Z) float32
        Intensities before acquisition; white matter about 1, no noise.
    reference : array (X, Y, Z) float32
        The lesions as an expert could see them, 0 or 1: borders where the soft profile crosses
        half its height, without parts too faint to tell.
    """
    image = tissue_contrast(rng)[tissue]
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    brain = (tissue >= Tissue.CORTEX) & (tissue < Tissue.BONE)
    image = np.where(brain, image * tissue_variation(rng, shape), image)
    grey = np.isin(tissue, (Tissue.CORTEX, Tissue.LIMBIC, Tissue.CEREBELLAR_CORTEX))
    uneven = 1.0 + uniform(rng, 0.0, 0.18) * smooth_field(rng, shape, uniform(rng, 10.0, 25.0))
    image = np.where(grey, image * uneven, image)
    _normal_rims(rng, image, tissue, distance_mm)
    _pyramidal_tract(rng, image, tissue, to_mni_mm)
    # draws of its own: other things of a seeded scan stay as they were
    _bright_cortex(rng.spawn(1)[0], image, tissue, to_mni_mm)
    _septum(rng, image, tissue, distance_mm)
    _look_alikes_in_fluid(rng, image, tissue)
    _outside_the_brain(rng, image, tissue)
    _scalp_fat(rng.spawn(1)[0], image, tissue)
    typical = log_uniform(rng, TYPICAL_LESION_CONTRAST - 1.0, 0.8 * (LESION_CONTRAST[1] - 1.0))
    faintest = faintest_excess(typical)
    few = lesions.sum() < _FEW_MM3
    dirt = min(faintest, _MOST_DIRT_ALONE) if few else faintest
    _dirty_white_matter(rng, image, tissue, dirt)
    return _add_lesions(rng, image, lesions, typical, faintest)


def tissue_contrast(rng: np.random.Generator) -> FloatArray:
    """Draw the mean intensity of every tissue, relative to white matter; indexed by Tissue."""
    mean = np.zeros(len(Tissue), dtype=np.float32)
    fluid = log_uniform(rng, 0.04, 0.55)
    cortex = uniform(rng, 1.02, 1.5)
    mean[Tissue.CSF] = fluid * uniform(rng, 0.9, 1.4)
    mean[Tissue.VENTRICLE] = fluid
    mean[Tissue.CORTEX] = cortex
    mean[Tissue.WHITE_MATTER] = 1.0
    mean[Tissue.DEEP_GREY] = 1.0 + (cortex - 1.0) * uniform(rng, 0.1, 0.9)
    mean[Tissue.PALLIDUM] = uniform(rng, 0.75, 1.08)
    mean[Tissue.LIMBIC] = cortex * uniform(rng, 0.95, 1.25)
    mean[Tissue.BRAINSTEM] = uniform(rng, 0.88, 1.25)
    mean[Tissue.CEREBELLAR_CORTEX] = 1.0 + (cortex - 1.0) * uniform(rng, 0.4, 1.0)
    mean[Tissue.CEREBELLAR_WHITE] = uniform(rng, 0.88, 1.1)
    mean[Tissue.BONE] = uniform(rng, 0.02, 0.3)
    mean[Tissue.MARROW] = log_uniform(rng, 0.1, 2.0)
    mean[Tissue.SOFT] = uniform(rng, 0.2, 1.0)
    mean[Tissue.SKIN] = log_uniform(rng, 0.3, 4.0)
    mean[Tissue.OTHER] = uniform(rng, 0.2, 1.6)
    return mean


def _normal_rims(
    rng: np.random.Generator, image: FloatArray, tissue: LabelArray, distance_mm: FloatArray
) -> None:
    """Brighten thin ependymal rims and a haze behind the horns: normal, hence never labelled."""
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    white = tissue == Tissue.WHITE_MATTER
    if rng.random() < 0.5:
        strength = uniform(rng, 0.05, 0.3) * np.clip(0.6 + smooth_field(rng, shape, 15.0), 0.0, 1.5)
        rim = white & (distance_mm < uniform(rng, 0.7, 1.5))
        image += np.where(rim, strength, 0.0)
    if rng.random() < 0.5:
        reach_mm = uniform(rng, 4.0, 14.0)
        strength = uniform(rng, 0.03, 0.2) * np.clip(0.5 + smooth_field(rng, shape, 25.0), 0.0, 1.5)
        image += np.where(white, strength * np.exp(-distance_mm / reach_mm), 0.0)


_PYRAMIDAL_TRACT_MM = ((9, -18, -22), (14, -18, -8), (22, -17, 8), (25, -21, 28), (27, -26, 48))
"""Course on the right side in MNI space, from the cerebral peduncle to the motor cortex."""


def _pyramidal_tract(
    rng: np.random.Generator, image: FloatArray, tissue: LabelArray, to_mni_mm: FloatArray
) -> None:
    """Brighten both pyramidal tracts a little, as at high field: normal, hence never labelled."""
    if rng.random() < 0.5:
        return
    profile = _along(_PYRAMIDAL_TRACT_MM, uniform(rng, 3.0, 6.0), tissue, to_mni_mm)
    hosts = np.isin(tissue, (Tissue.WHITE_MATTER, Tissue.BRAINSTEM))
    image += np.where(hosts, uniform(rng, 0.03, 0.22) * profile, 0.0)


_BRIGHT_CORTEX = (
    (0.3, ((34, 20, 0), (38, 6, 2), (38, -8, 6), (36, -20, 12))),  # insula
    (0.3, ((6, 36, 8), (6, 22, 30), (6, -10, 40), (6, -40, 32), (10, -48, 10))),  # cingulate gyrus
    # hippocampus, up to its tail; it is brighter than other cortex to begin with
    (0.2, ((20, -6, -20), (28, -22, -14), (28, -34, -6), (20, -40, 4))),
)
"""Cortex that FLAIR shows brighter than the rest: by how much at most, and its course on the right
side in MNI millimetres."""


def _bright_cortex(
    rng: np.random.Generator, image: FloatArray, tissue: LabelArray, to_mni_mm: FloatArray
) -> None:
    """Brighten the insula, the cingulate gyrus and the hippocampus: normal, never labelled."""
    grey = np.isin(tissue, (Tissue.CORTEX, Tissue.LIMBIC))
    for most, course_mm in _BRIGHT_CORTEX:
        strength, width_mm = uniform(rng, -0.1, most), uniform(rng, 7.0, 13.0)
        if strength > 0:
            profile = _along(course_mm, width_mm, tissue, to_mni_mm)
            image += np.where(grey, strength * profile, 0.0)


def _along(
    course_mm: Sequence[tuple[int, int, int]],
    width_mm: float,
    tissue: LabelArray,
    to_mni_mm: FloatArray,
) -> FloatArray:
    """Return (X, Y, Z) a profile of this width about a course through MNI space, on both sides."""
    points = np.array(course_mm, dtype=np.float32)
    steps = np.linspace(0.0, len(points) - 1.0, 24)
    course = np.stack([np.interp(steps, np.arange(len(points)), c) for c in points.T])
    place = to_mni_mm.copy()
    place[0] = np.abs(place[0])
    gap = place[..., None] - course[:, None, None, None]
    coarse_mm = np.sqrt((gap**2).sum(axis=0).min(axis=-1)).astype(np.float32)
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    return np.asarray(np.exp(-((upsample(coarse_mm, shape) / width_mm) ** 2)), dtype=np.float32)


def _septum(
    rng: np.random.Generator, image: FloatArray, tissue: LabelArray, distance_mm: FloatArray
) -> None:
    """Brighten the thin walls between the ventricles (septum, fornix): never labelled."""
    if rng.random() < 0.4:
        return
    near = np.argwhere(distance_mm < 6.0)
    if not len(near):
        return
    box = tuple(slice(a, b + 1) for a, b in zip(near.min(axis=0), near.max(axis=0), strict=True))
    fluid = tissue[box] == Tissue.VENTRICLE
    wide = ndimage.binary_dilation(fluid, iterations=2)
    # what lies within 4 mm of fluid on the left and on the right
    between = np.roll(wide, 2, axis=0) & np.roll(wide, -2, axis=0) & ~fluid
    solid = between & (tissue[box] > Tissue.VENTRICLE) & (tissue[box] < Tissue.BONE)
    image[box] += np.where(solid, uniform(rng, 0.05, 0.6), 0.0)


def _dirty_white_matter(
    rng: np.random.Generator, image: FloatArray, tissue: LabelArray, most: float
) -> None:
    """Brighten patches of white matter by at most ``most``: never labelled."""
    if rng.random() < 0.25:
        return
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    patches = np.clip(smooth_field(rng, shape, uniform(rng, 6.0, 18.0)) - 0.2, 0.0, 1.0)
    strength = uniform(rng, 0.3, 0.8) * most
    image += np.where(tissue == Tissue.WHITE_MATTER, strength * patches, 0.0)


def _look_alikes_in_fluid(rng: np.random.Generator, image: FloatArray, tissue: LabelArray) -> None:
    """Brighten parts of fluid that are no lesions: choroid plexus, flow artefacts, vessels."""
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    if rng.random() < 0.7:
        plexus = smooth_field(rng, shape, uniform(rng, 4.0, 8.0)) > uniform(rng, 0.9, 1.8)
        plexus &= tissue == Tissue.VENTRICLE
        image[plexus] = uniform(rng, 0.6, 1.5)
    if rng.random() < 0.4:
        fluid = np.isin(tissue, _FLUID)
        flow = np.clip(smooth_field(rng, shape, uniform(rng, 8.0, 25.0)) - 0.7, 0.0, 1.0)
        image += np.where(fluid, uniform(rng, 0.2, 1.2) * flow, 0.0)
    if rng.random() < 0.4:
        fluid_voxels = np.flatnonzero((tissue == Tissue.CSF).ravel())
        if fluid_voxels.size:
            dots = rng.choice(fluid_voxels, size=int(log_uniform(rng, 10, 400)))
            image.ravel()[dots] = uniform(rng, 1.0, 3.0)


def _outside_the_brain(rng: np.random.Generator, image: FloatArray, tissue: LabelArray) -> None:
    """Break up the uniform labels of scalp, marrow and face."""
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    outside = tissue >= Tissue.BONE
    if not outside.any():
        return
    variation = np.exp(
        uniform(rng, 0.05, 0.4) * smooth_field(rng, shape, 12.0)
        + uniform(rng, 0.05, 0.4) * smooth_field(rng, shape, 4.0)
    )
    image[outside] *= variation[outside]


_SCALP_FAT = (0.8, 4.0)
"""Brightness of subcutaneous fat. In ten whole heads at 1.5 T the scalp has 1.2 times white matter
in the median, 2.5 times at the 95th percentile of its voxels."""


def _scalp_fat(rng: np.random.Generator, image: FloatArray, tissue: LabelArray) -> None:
    """Lay fat under the skin: a bright layer of some millimetres, which is no lesion."""
    if rng.random() < 0.35 or not (tissue == Tissue.SKIN).any():
        return
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    coarse = np.pad(tissue[::2, ::2, ::2] != Tissue.AIR, ((1, 1), (1, 1), (0, 0)))
    # from the border of voxels of 2 mm, which is where the distance to the next one is 1 mm
    coarse_mm = 2.0 * ndimage.distance_transform_edt(coarse)[1:-1, 1:-1] - 1.0
    depth_mm = fill_between(coarse_mm.astype(np.float32), shape)
    thick_mm = uniform(rng, 2.0, 9.0) * np.exp(0.3 * smooth_field(rng, shape, 30.0))
    first_mm = uniform(rng, 0.0, 2.0)
    fat = np.isin(tissue, (Tissue.SKIN, Tissue.SOFT))
    fat &= (depth_mm > first_mm) & (depth_mm < first_mm + thick_mm)
    # septa, muscle and aponeurosis break it up
    share = uniform(rng, 0.7, 1.0) + uniform(rng, 0.0, 0.4) * smooth_field(
        rng, shape, uniform(rng, 3.0, 8.0)
    )
    bright = log_uniform(rng, *_SCALP_FAT)
    image[fat] += np.clip(share[fat], 0.0, 1.0) * (bright - image[fat])


def faintest_excess(typical: float) -> float:
    """Return the excess over white matter from which a subject's lesions are called lesions.

    Readers call a lesion what stands out among the subject's own.
    """
    return float(np.clip(0.6 * typical, LESION_CONTRAST[0] - 1.0 + 0.02, 0.25))


def shade_lesions(
    rng: np.random.Generator, lesions: FloatArray, typical: float
) -> tuple[FloatArray, FloatArray]:
    """Give lesions uneven brightness and soft borders.

    Parameters
    ----------
    rng
        Source of randomness.
    lesions
        (X, Y, Z) 0 or 1, voxels of 1 mm.
    typical
        Mean excess brightness over white matter, 0.5 for half as bright again.

    Returns
    -------
    excess : array (X, Y, Z) float32
        Of a voxel that a lesion fills.
    profile : array (X, Y, Z) float32
        Share that lesions fill of a voxel, in [0, 1].
    """
    shape = (lesions.shape[0], lesions.shape[1], lesions.shape[2])
    between = np.exp(uniform(rng, 0.1, 0.4) * smooth_field(rng, shape, uniform(rng, 6.0, 14.0)))
    within = 1.0 + uniform(rng, 0.0, 0.2) * smooth_field(rng, shape, 2.5)
    excess = np.clip(typical * between * within, 0.0, LESION_CONTRAST[1] - 1.0 + 0.3)
    # plaques have sharp borders, vascular haloes fade
    blur_mm = uniform(rng, 0.4, 1.3) if rng.random() < 0.75 else uniform(rng, 1.3, 2.5)
    return excess.astype(np.float32), ndimage.gaussian_filter(lesions, blur_mm)


def _add_lesions(
    rng: np.random.Generator,
    image: FloatArray,
    lesions: FloatArray,
    typical: float,
    faintest: float,
) -> tuple[FloatArray, FloatArray]:
    """Blend lesions in with soft borders and uneven brightness; return image and reference.

    ``typical`` and ``faintest`` are excesses over white matter; what is fainter stays unlabelled.
    """
    if not lesions.any():
        return image, lesions
    excess, profile = shade_lesions(rng, lesions, typical)
    bright = image + excess * profile
    if rng.random() < 0.3:  # grey matter hosts are no brighter for being lesions twice over
        bright = np.maximum(image, np.minimum(bright, 1.0 + excess))
    visible = (profile > 0.5) & (excess > faintest)
    return bright.astype(np.float32), visible.astype(np.float32)
