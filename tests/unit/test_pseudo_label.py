"""Labels that a model gives to scans: what it is sure of, what it leaves open, what it excludes."""

from __future__ import annotations

import numpy as np

from tools.pseudo_label import plausible_structures, pseudo_labels, without_faint
from wmh_lora.volume import Volume


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


def test_what_is_faint_beside_other_lesions_is_taken_back() -> None:
    labels = np.zeros((60, 60, 5), dtype=np.uint8)
    scan = np.ones(labels.shape, dtype=np.float32)
    bright, fair, haze = np.s_[20:32, 20:32, 1:4], np.s_[5:13, 5:13, 2], np.s_[45:53, 45:53, 2]
    open_already = np.s_[45:53, 5:13, 2]
    for place, excess in ((bright, 0.5), (fair, 0.3), (haze, 0.1)):
        labels[place] = 1
        scan[place] += excess
    labels[open_already] = 2
    before = labels.copy()
    normal = labels == 0
    judged = without_faint(labels, Volume(scan, np.diag([1.0, 1.0, 4.0, 1.0])), normal)
    np.testing.assert_array_equal(labels, before)
    assert (judged[22:30, 22:30, 1:4] == 1).all()
    assert (judged[7:11, 7:11, 2] == 2).all()  # readers differ
    assert (judged[47:51, 47:51, 2] == 0).all()
    assert (judged[open_already] == 2).all()
    assert (judged[normal] == 0).all()


def test_missing_values_outside_the_brain_take_no_lesion_back() -> None:
    labels = np.zeros((60, 60, 5), dtype=np.uint8)
    labels[20:32, 20:32, 1:4] = 1
    scan = np.where(labels == 1, 1.5, 1.0).astype(np.float32)
    scan[:4] = np.nan
    normal = (labels == 0) & np.isfinite(scan)
    judged = without_faint(labels, Volume(scan, np.diag([1.0, 1.0, 4.0, 1.0])), normal)
    assert (judged[22:30, 22:30, 1:4] == 1).all()


def test_structures_that_cannot_be_are_not_labelled() -> None:
    shape = (40, 40, 40)
    volume = Volume(np.ones(shape, np.float32), np.diag([4.0, 4.0, 4.0, 1.0]))
    brain = np.zeros(shape, np.uint8)
    brain[8:32, 6:34, 8:32] = 1
    ventricles = np.zeros(shape, np.uint8)
    ventricles[17:23, 14:26, 18:22] = 1
    ventricles[0, 0, 0] = 1
    named = plausible_structures({"brain": brain, "ventricles": ventricles}, volume)
    np.testing.assert_array_equal(named["brain"], brain)
    assert named["ventricles"].sum() == ventricles.sum() - 1, "what lies outside the brain goes"
    assert named["ventricles"].dtype == np.uint8
    few = np.zeros(shape, np.uint8)
    few[20, 20, 20] = 1
    assert list(plausible_structures({"brain": brain, "ventricles": few}, volume)) == ["brain"]
    assert not plausible_structures({"brain": few, "ventricles": few}, volume)
