"""Registration of landmarks: a known shift and stretch is found; wrapped codes are told apart."""

from __future__ import annotations

import numpy as np

from wmh_lora.data.anatomy import Tissue, tissues_of_codes
from wmh_lora.data.fields import FloatArray
from wmh_lora.data.registration import register_to_template


def ellipsoids(shape: tuple[int, int, int], centre: list[float], scale: float) -> FloatArray:
    """Brain, white matter and two lateral ventricles as landmark maps (3, X, Y, Z)."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).astype(float)
    offset = (grid - np.array(centre)[:, None, None, None]) / scale
    radius = np.sqrt((offset[0] / 22) ** 2 + (offset[1] / 28) ** 2 + (offset[2] / 20) ** 2)
    ventricle = np.hypot(np.hypot((np.abs(offset[0]) - 6) / 4, offset[1] / 12), offset[2] / 5) < 1
    return np.stack([radius < 1, (radius < 0.7) & ~ventricle, 2.0 * ventricle]).astype(np.float32)


def test_a_known_shift_and_stretch_is_found() -> None:
    template = ellipsoids((64, 72, 60), [31.5, 35.5, 29.5], 1.0)
    subject = ellipsoids((72, 84, 68), [38.0, 40.0, 31.0], 1.2)
    field = register_to_template(subject, template, 8, iterations=60)
    nodes = np.stack(np.meshgrid(*(np.arange(0, n + 8, 8) for n in (72, 84, 68)), indexing="ij"))
    expected = (nodes - np.array([38.0, 40.0, 31.0])[:, None, None, None]) / 1.2
    expected += np.array([31.5, 35.5, 29.5])[:, None, None, None]
    inside = np.linalg.norm((expected.T - [31.5, 35.5, 29.5]) / [22, 28, 20], axis=-1).T < 0.9
    assert inside.sum() > 50
    assert np.abs(field - expected)[:, inside].mean() < 1.5


def test_wrapped_codes_are_told_from_brain() -> None:
    """Code 3 is cortex beside white matter and skull beside scalp; code 4 ventricle or marrow."""
    grid = np.stack(np.meshgrid(*(np.arange(72),) * 3, indexing="ij")) - 35.5
    radius = np.sqrt((grid**2).sum(axis=0))
    codes = np.zeros(radius.shape, dtype=np.int16)
    for outer, code in ((34, 255), (31, 251), (28, 3), (25, 24), (21, 3), (17, 2), (7, 10), (4, 4)):
        codes[radius < outer] = code
    tissue = tissues_of_codes(codes)
    assert (tissue[(radius > 17) & (radius < 20.5)] == Tissue.CORTEX).all()
    assert (tissue[(radius > 25.5) & (radius < 28)] == Tissue.BONE).all()
    assert (tissue[radius < 3.5] == Tissue.VENTRICLE).all()
    assert (tissue[(radius > 8) & (radius < 16.5)] == Tissue.WHITE_MATTER).all()
