"""False voxels are told apart by where they lie, and none is counted twice."""

from __future__ import annotations

import numpy as np

from benchmarks.false_lesions import PLACES, divide


def test_every_false_voxel_has_one_place() -> None:
    shape = (80, 80, 3)
    brain = np.zeros(shape, dtype=np.bool_)
    brain[10:70, 10:70] = True
    ventricles, lesion, false = (np.zeros(shape, dtype=np.bool_) for _ in range(3))
    ventricles[38:42, 38:42, 1] = True
    lesion[28:31, 28:31, 1] = True
    expected = {
        "around a lesion": (32, 30, 1),
        "near the ventricles": (46, 40, 1),
        "at the surface": (2, 40, 1),  # outside the brain
        "elsewhere": (30, 50, 1),
    }
    for place in expected.values():
        false[place] = True
    false[44, 40, 2] = True  # the next slice is 7 mm away: not near
    parts = dict(zip(PLACES, divide(false, lesion, ventricles, brain, (1.0, 1.0, 7.0))))
    np.testing.assert_array_equal(sum(part.astype(int) for part in parts.values()), false)
    for name, place in expected.items():
        assert parts[name][place]
    assert parts["elsewhere"][44, 40, 2]
