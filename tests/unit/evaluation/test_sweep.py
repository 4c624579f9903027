"""The sweep against the engine's own steps and the challenge's measures, setting by setting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.errors import GridMismatchError
from wmh_lora.evaluation.metrics import evaluate
from wmh_lora.evaluation.sweep import SWEPT_MEASURES, sweep
from wmh_lora.postprocess import lesion_mask

THRESHOLDS = (0.1, 0.35, 0.5, 0.6, 0.9)
SIZES = (0, 1, 2, 3, 6, 40)


def _scan(seed: int, other: bool) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A blotchy probability map in the engine's steps, and labels that overlap with it in part."""
    rng = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(rng.normal(size=(18, 15, 9)), 1.0) for _ in range(3)]
    field = fields[0] / fields[0].std()
    probability = np.rint(4096.0 / (1.0 + np.exp(2.0 - 3.0 * field))) / 4096.0
    labels = (field + fields[1] / fields[1].std() > 2.0).astype(np.uint8)
    if other:
        labels[fields[2] > 1.2 * fields[2].std()] = 2
    return probability.astype(np.float32), labels


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), other=st.booleans(), peak=st.sampled_from([0.0, 0.7, 0.95]))
def test_equals_mask_by_mask_scoring(seed: int, other: bool, peak: float) -> None:
    probability, labels = _scan(seed, other)
    swept = sweep(probability, labels, THRESHOLDS, SIZES, min_peak=peak)
    for row, threshold in enumerate(THRESHOLDS):
        for column, size in enumerate(SIZES):
            mask = lesion_mask(probability, threshold, size, peak)
            expected = evaluate(labels, mask, (1.0, 1.0, 1.0)).to_dict()
            for key in SWEPT_MEASURES:
                assert swept[key][row, column] == pytest.approx(expected[key], nan_ok=True), key
            voxels = expected["prediction_ml"] * 1000.0
            assert swept["prediction_voxels"][row, column] == pytest.approx(voxels)


@given(seed=st.integers(0, 10_000))
def test_a_permissive_threshold_never_shrinks_the_mask(seed: int) -> None:
    probability, labels = _scan(seed, other=False)
    levels = np.linspace(0.02, 0.98, 25)
    voxels = sweep(probability, labels, levels.tolist(), [1])["prediction_voxels"][:, 0]
    assert np.all(np.diff(voxels) <= 0)
    # A larger smallest size never adds anything either.
    filtered = sweep(probability, labels, [0.3], range(30))["prediction_voxels"][0]
    assert np.all(np.diff(filtered) <= 0)


def test_other_pathology_may_cut_a_lesion_in_two() -> None:
    probability = np.full((1, 1, 5), 0.9, np.float32)
    labels = np.array([[[1, 0, 2, 0, 0]]])
    swept = sweep(probability, labels, [0.5], [5, 6])
    # Kept or removed whole, by its five voxels; then scored as two pieces, one of which touches.
    assert swept["lesion_precision"].tolist() == [[0.5, 1.0]]
    assert swept["prediction_voxels"].tolist() == [[4.0, 0.0]]


def test_nothing_found_and_nothing_there() -> None:
    nothing = np.zeros((3, 4, 5), np.float32)
    swept = sweep(nothing, nothing, [0.5], [1])
    assert math.isnan(swept["dice"][0, 0])
    assert math.isnan(swept["avd_percent"][0, 0])
    assert swept["lesion_f1"][0, 0] == 1.0


def test_shapes_must_agree() -> None:
    with pytest.raises(GridMismatchError, match="Resample"):
        sweep(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 3)), [0.5], [1])
