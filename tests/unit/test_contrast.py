"""Brightness beside the tissue around: shading drops out, and slices do not see each other."""

from __future__ import annotations

import numpy as np
import pytest

from wmh_lora.contrast import local_contrast

SHAPE = (80, 80, 6)
SPACING_MM = (1.0, 1.0, 4.0)


def test_even_tissue_has_a_contrast_of_one_up_to_its_border() -> None:
    normal = np.zeros(SHAPE, dtype=np.bool_)
    normal[20:60, 20:60] = True
    image = np.where(normal, 0.4, 0.0).astype(np.float32)
    contrast = local_contrast(image, normal, SPACING_MM, through=2, smooth_mm=0.6)
    np.testing.assert_allclose(contrast[24:56, 24:56], 1.0, rtol=1e-5)
    assert np.isinf(contrast[:4, :4]).all()  # nothing within 15 mm to compare with


@pytest.mark.parametrize("through", [0, 2])
def test_gain_that_changes_from_slice_to_slice_drops_out(through: int) -> None:
    rng = np.random.default_rng(3)
    image = rng.uniform(0.3, 0.6, SHAPE).astype(np.float32)
    normal = rng.random(SHAPE) < 0.8
    gain = np.linspace(0.5, 2.0, SHAPE[through], dtype=np.float32)
    gain = np.expand_dims(gain, [a for a in range(3) if a != through])
    plain, shaded = (
        local_contrast(i, normal, SPACING_MM, through=through, smooth_mm=0.6)
        for i in (image, image * gain)
    )
    np.testing.assert_allclose(shaded, plain, rtol=1e-4)


def test_a_slow_slope_hardly_matters() -> None:
    normal = np.ones(SHAPE, dtype=np.bool_)
    slope = np.linspace(0.8, 1.2, SHAPE[0], dtype=np.float32)[:, None, None]
    image = np.full(SHAPE, 0.4, dtype=np.float32)
    image[40, 40, 3] *= 1.5
    contrast = local_contrast(image * slope, normal, SPACING_MM, through=2, smooth_mm=0.0)
    assert contrast[40, 40, 3] == pytest.approx(1.5, rel=0.01)
    inner = np.delete(contrast[20:60, 20:60].ravel(), 20 * 40 * 6 + 20 * 6 + 3)
    assert np.abs(inner - 1.0).max() < 0.02
