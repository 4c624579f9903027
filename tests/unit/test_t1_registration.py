"""A known movement between T1 and FLAIR is found again."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial.transform import Rotation

from tests.phantoms import head
from wmh_lora.errors import ConfigError
from wmh_lora.t1_registration import register_t1
from wmh_lora.volume import Volume

LEVELS = {"t1": (0.5, 260.0, 90.0, 140.0, 25.0), "flair": (5.0, 150.0, 120.0, 100.0, 15.0)}


def phantom(
    contrast: str, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> Volume:
    """Air, scalp, grey and white matter and fluid of a head that has no symmetry."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(spacing) * (np.array(shape) - 1) / 2
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)
    x, y, z = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3, None, None, None]
    labels = np.zeros(shape, np.int64)
    radius = np.sqrt((x / 74) ** 2 + (y / 90) ** 2 + (z / 66) ** 2)
    labels[radius < 1.0] = 1
    labels[radius < 0.9] = 2
    draw = np.random.default_rng(5)
    for label in (3, 4) * 12:  # folds, in place of a cortex
        centre, length = draw.uniform(-50, 50, 3), draw.uniform(8, 22, 3)
        offsets = ((p - c) / r for p, c, r in zip((x, y, z), centre, length))
        labels[(sum(offset**2 for offset in offsets) < 1) & (labels > 1)] = label
    noise = np.random.default_rng(len(contrast)).normal(0.0, 3.0, shape)
    return Volume((np.array(LEVELS[contrast])[labels] + noise).astype(np.float32), affine)


def movement(
    angles_deg: tuple[float, float, float],
    shift_mm: tuple[float, float, float],
    centre_mm: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    matrix[:3, 3] = centre_mm + shift_mm - matrix[:3, :3] @ centre_mm
    return matrix


def error(
    found: npt.NDArray[np.float64],
    expected: npt.NDArray[np.float64],
    centre_mm: npt.NDArray[np.float64],
) -> tuple[float, float]:
    """What is left in mm, at the centre of the head, and in degrees."""
    left = found @ np.linalg.inv(expected)
    cosine = np.clip((np.trace(left[:3, :3]) - 1) / 2, -1.0, 1.0)
    shift = left[:3, :3] @ centre_mm + left[:3, 3] - centre_mm
    return float(np.linalg.norm(shift)), float(np.degrees(np.arccos(cosine)))


@pytest.mark.parametrize(
    ("angles_deg", "shift_mm"),
    [((3.0, -4.0, 5.0), (6.0, -5.0, 4.0)), ((0.0, 0.0, 6.0), (0.0, 20.0, 180.0))],
    ids=["moved-head", "another-origin"],
)
def test_a_known_movement_is_taken_back(
    angles_deg: tuple[float, float, float], shift_mm: tuple[float, float, float]
) -> None:
    flair = phantom("flair", (50, 60, 22), (3.5, 3.5, 6.5))
    t1 = phantom("t1", (50, 60, 48), (3.2, 3.2, 3.2))
    moved = replace(t1, affine=movement(angles_deg, shift_mm, np.zeros(3)) @ t1.affine)
    found = register_t1(moved, flair)
    left_mm, left_deg = error(found.affine, t1.affine, np.zeros(3))
    assert left_mm < 1.0
    assert left_deg < 1.0
    assert found.data is moved.data, "voxels are not touched"


def test_without_simpleitk_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r"pip install 'wmh-lora\[registration\]'"):
        register_t1(head()[0], head()[0])


@pytest.mark.realdata
@pytest.mark.parametrize("number", ["01", "06"])
def test_a_real_t1_is_brought_back(shared_data: Path, number: str) -> None:
    folder = shared_data / "tabriz" / f"sub-{number}" / "anat"
    flair, t1 = (Volume.read(folder / f"sub-{number}_{name}.nii.gz") for name in ("FLAIR", "T1w"))
    centre = flair.affine[:3, :3] @ ((np.array(flair.shape) - 1) / 2) + flair.affine[:3, 3]
    movements = [((3.0, -4.0, 5.0), (6.0, -5.0, 4.0)), ((-8.0, 6.0, 10.0), (-12.0, 10.0, 15.0))]
    for angles, shift in movements:
        moved = replace(t1, affine=movement(angles, shift, centre) @ t1.affine)
        left_mm, left_deg = error(register_t1(moved, flair).affine, t1.affine, centre)
        assert left_mm < 1.0
        assert left_deg < 1.0
    again = register_t1(moved, flair)
    np.testing.assert_array_equal(again.affine, register_t1(moved, flair).affine)
