"""Thick slices are means of thin ones."""

from __future__ import annotations

import numpy as np

from benchmarks.contrast import average_slices


def test_slices_are_averaged_and_what_is_left_over_is_cut() -> None:
    thin = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    thick = average_slices(thin, 3)
    np.testing.assert_allclose(
        thick, np.stack([thin[..., :3].mean(-1), thin[..., 3:6].mean(-1)], -1)
    )
    np.testing.assert_array_equal(average_slices(thin, 1), thin)
