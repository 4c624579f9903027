"""Give tissues T1-like intensities (white matter is 1): what a T1 beside a synthetic FLAIR shows.

White matter is the brightest tissue of the brain and fluid the darkest; lesions are as bright as
white matter or darker, down to grey matter ("black holes").
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.anatomy import Tissue
from wmh_lora.data.fields import FloatArray, log_uniform, smooth_field, tissue_variation, uniform

DARKEST_LESION = 0.5
"""Of a lesion's signal, the share that it loses at most."""


def paint_t1(
    rng: np.random.Generator, tissue: npt.NDArray[np.uint8], lesions: FloatArray
) -> FloatArray:
    """Paint the T1 of one subject.

    Parameters
    ----------
    rng
        Source of randomness.
    tissue
        (X, Y, Z) tissue labels, 1 mm.
    lesions
        (X, Y, Z) lesion mask, 0 or 1.

    Returns
    -------
    array (X, Y, Z) float32
        Intensities before acquisition; white matter about 1, no noise.
    """
    image = t1_contrast(rng)[tissue]
    shape = (tissue.shape[0], tissue.shape[1], tissue.shape[2])
    image *= tissue_variation(rng, shape)
    if lesions.any():
        between = np.exp(uniform(rng, 0.1, 0.5) * smooth_field(rng, shape, uniform(rng, 6.0, 14.0)))
        lost = np.clip(uniform(rng, 0.0, DARKEST_LESION) * between, 0.0, DARKEST_LESION)
        image *= 1.0 - lost * ndimage.gaussian_filter(lesions, uniform(rng, 0.4, 1.3))
    return np.asarray(image, dtype=np.float32)


def t1_contrast(rng: np.random.Generator) -> FloatArray:
    """Draw the mean intensity of every tissue, relative to white matter; indexed by Tissue."""
    mean = np.zeros(len(Tissue), dtype=np.float32)
    cortex = uniform(rng, 0.55, 0.85)
    fluid = log_uniform(rng, 0.05, 0.4)
    mean[Tissue.CSF] = fluid * uniform(rng, 0.9, 1.2)
    mean[Tissue.VENTRICLE] = fluid
    mean[Tissue.CORTEX] = cortex
    mean[Tissue.WHITE_MATTER] = 1.0
    mean[Tissue.DEEP_GREY] = cortex + (1.0 - cortex) * uniform(rng, 0.1, 0.7)
    mean[Tissue.PALLIDUM] = uniform(rng, 0.85, 1.0)
    mean[Tissue.LIMBIC] = cortex * uniform(rng, 0.95, 1.05)
    mean[Tissue.BRAINSTEM] = uniform(rng, 0.85, 1.0)
    mean[Tissue.CEREBELLAR_CORTEX] = cortex * uniform(rng, 0.95, 1.1)
    mean[Tissue.CEREBELLAR_WHITE] = uniform(rng, 0.9, 1.03)
    mean[Tissue.BONE] = uniform(rng, 0.02, 0.25)
    mean[Tissue.MARROW] = log_uniform(rng, 0.3, 1.6)
    mean[Tissue.SOFT] = uniform(rng, 0.4, 0.9)
    mean[Tissue.SKIN] = log_uniform(rng, 0.6, 2.5)
    mean[Tissue.OTHER] = uniform(rng, 0.3, 1.2)
    return mean
