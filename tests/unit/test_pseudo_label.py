"""Labels that a model gives to scans: what it is sure of, what it leaves open, what it excludes."""

from __future__ import annotations

import numpy as np

from tools.pseudo_label import pseudo_labels


def test_components_are_sure_open_or_background() -> None:
    probability = np.zeros((12, 5, 3), dtype=np.float32)
    probability[1:3, 1:3, 1] = [[0.95, 0.5], [0.35, 0.2]]  # sure, with a part below the threshold
    probability[5:7, 1:3, 1] = 0.6  # above the threshold, never sure
    probability[9, 1, 1] = 0.05  # nothing
    probability[11, 4, 2] = 0.99  # outside the brain
    brain = np.ones(probability.shape, dtype=np.bool_)
    brain[11] = False
    labels = pseudo_labels(probability, brain, threshold=0.3, sure=0.85, doubt=0.1)
    assert labels.dtype == np.uint8
    expected = np.zeros_like(labels)
    expected[1:3, 1:3, 1] = [[1, 1], [1, 2]]
    expected[5:7, 1:3, 1] = 2
    np.testing.assert_array_equal(labels, expected)
