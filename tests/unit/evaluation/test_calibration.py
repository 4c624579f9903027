"""Calibration recovers what was done to true probabilities, and counts as a plain mean would."""

from __future__ import annotations

import numpy as np
import pytest

from wmh_lora.errors import DataError
from wmh_lora.evaluation.calibration import Calibration, ProbabilityCounts, fit_calibration

SHAPE = (60, 60, 60)


def _counts(temperature: float, shift: float) -> ProbabilityCounts:
    """Lesions drawn by true probabilities, of which a distorted version is told."""
    rng = np.random.default_rng(0)
    logit = rng.normal(-2.0, 2.0, SHAPE)
    lesion = rng.random(SHAPE) < 1.0 / (1.0 + np.exp(-logit))
    told = 1.0 / (1.0 + np.exp(-(logit - shift) * temperature))
    return ProbabilityCounts.of(told.astype(np.float32), lesion, np.ones(SHAPE, np.bool_))


@pytest.mark.parametrize(("temperature", "shift"), [(1.0, 0.0), (1.6, 0.5), (0.7, -0.8)])
def test_a_distortion_is_found_and_undone(temperature: float, shift: float) -> None:
    counts = _counts(temperature, shift)
    found = fit_calibration(counts)
    assert found.temperature == pytest.approx(temperature, rel=0.05)
    assert found.shift == pytest.approx(shift, abs=0.06)
    assert counts.calibration_error(found) < 0.01
    assert counts.loss(found) <= counts.loss() + 1e-9


def test_counts_are_those_of_the_voxels() -> None:
    probability = np.array([[[0.0, 0.25, 0.25, 0.95, 1.0]]], np.float32)
    lesion = np.array([[[0, 1, 0, 1, 1]]], bool)
    counted = np.array([[[1, 1, 1, 1, 0]]], bool)
    counts = ProbabilityCounts.of(probability, lesion, counted)
    low, middle, high = counts.reliability()
    assert (low.voxels, low.observed) == (1, 0.0)
    assert (middle.voxels, middle.probability, middle.observed) == (2, 0.25, 0.5)
    assert (high.voxels, high.observed) == (1, 1.0)
    assert counts.calibration_error() == pytest.approx((2 * 0.25 + 0.05) / 3, abs=1e-3)
    twice = counts + counts
    assert twice.voxels.sum() == 8
    assert twice.loss() == pytest.approx(counts.loss())


def test_no_correction_keeps_probabilities() -> None:
    levels = np.linspace(0.01, 0.99, 9)
    np.testing.assert_allclose(Calibration().apply(levels), levels)


def test_one_kind_of_voxel_teaches_nothing() -> None:
    nothing = np.zeros((2, 2, 2), np.bool_)
    with pytest.raises(DataError, match="both kinds"):
        fit_calibration(ProbabilityCounts.of(np.zeros((2, 2, 2), np.float32), nothing, ~nothing))
