"""Preprocess then restore keeps the grid, over orientations, spacings and odd sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_preprocess import all_axis_codes, head_phantom, stored_as
from wmh_lora.config import PreprocessConfig
from wmh_lora.preprocess import preprocess, restore

spacings = st.floats(1.5, 5.0)


@given(
    codes=st.sampled_from(all_axis_codes()),
    spacing=st.tuples(spacings, spacings, st.floats(1.5, 9.0)),
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)),
    pixel_size_mm=st.floats(0.8, 3.0),
)
def test_restore_keeps_shape_and_range(
    codes: tuple[str, str, str],
    spacing: tuple[float, float, float],
    extra: tuple[int, int, int],
    pixel_size_mm: float,
) -> None:
    extents_mm = (170.0, 200.0, 150.0)
    i, j, k = (int(e / s) + 3 + x for e, s, x in zip(extents_mm, spacing, extra, strict=True))
    volume = stored_as(head_phantom((i, j, k), spacing), codes)
    config = PreprocessConfig(pixel_size_mm=pixel_size_mm)
    prepared = preprocess(volume, config)
    back = restore(prepared.slices, prepared)
    assert back.shape == volume.shape
    assert back.dtype == np.float32
    assert back.min() >= 0.0
    assert back.max() <= 1.0 + 1e-6
    assert all(n % config.multiple_px == 0 for n in prepared.slices.shape[1:])
    ones = restore(np.ones_like(prepared.slices), prepared)
    assert np.all((ones == 0.0) | (np.abs(ones - 1.0) < 1e-5)), "weights of each voxel sum to one"
    assert ones.mean() > 0.2
