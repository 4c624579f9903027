"""The choice of a setting: the one-standard-error rule, its order, and the nested estimate."""

from __future__ import annotations

import numpy as np
import pytest

from wmh_lora.evaluation.selection import (
    Setting,
    choose,
    leave_one_out,
    mean_band,
    mean_interval,
    simplicity,
    subject_means,
)
from wmh_lora.evaluation.statistics import summarise


def test_simplicity_prefers_fewer_views_then_smaller_changes() -> None:
    present = Setting(0.5, 3, "d4")
    settings = [
        Setting(0.5, 3, "d4"),
        Setting(0.9, 3, "flip"),
        Setting(0.3, 3, "none"),
        Setting(0.6, 8, "none"),
        Setting(0.4, 5, "none"),  # as far as 0.6, which changes the size more
    ]
    ranks = simplicity(settings, present)
    order = sorted(range(len(settings)), key=ranks.__getitem__)
    assert order == [4, 3, 2, 1, 0]


def test_a_clear_winner_is_chosen() -> None:
    gains = np.array([[0.2, 0.80], [0.3, 0.91], [0.1, 0.70], [0.2, 0.82]])
    assert choose(gains, [0, 1]) == (1, 1)


def test_a_plateau_goes_to_the_simplest() -> None:
    # Subjects differ much, settings little: the paired difference is what counts.
    base = np.array([0.3, 0.5, 0.7, 0.9])
    noise = np.array([0.02, -0.02, 0.01, 0.0])
    gains = np.stack([base, base + noise, base - 0.05], axis=1)
    assert choose(gains, [2, 0, 1]) == (1, 1)
    assert choose(gains, [0, 2, 1]) == (1, 0)
    # 0.05 less on every subject is no chance, though far below the spread between subjects.
    assert choose(gains, [1, 2, 0])[1] != 2


def test_equal_means_go_to_the_simplest_and_one_subject_has_no_error() -> None:
    assert choose(np.array([[0.7, 0.7, 0.69]]), [1, 0, 2]) == (1, 1)
    assert choose(np.array([[0.7, 0.69]]), [1, 0]) == (0, 0)


def test_leaving_one_out_never_sees_its_subject() -> None:
    # Each column is perfect for one subject alone: chosen with it, it looks perfect.
    gains = np.eye(3) + np.array([[0.0, 0.2, 0.1]] * 3)
    for subject, column in enumerate(leave_one_out(gains, [0, 1, 2])):
        others = np.delete(gains, subject, axis=0)
        assert column == choose(others, [0, 1, 2])[1]
        changed = gains.copy()
        changed[subject] = 100.0
        assert leave_one_out(changed, [0, 1, 2])[subject] == column
    assert leave_one_out(gains[:1], [0, 1, 2]) == []


def test_bands_are_those_of_the_statistics(rng: np.random.Generator) -> None:
    scores = rng.random((7, 4))
    low, high = mean_band(scores)
    for column in range(4):
        summary = summarise(scores[:, column], [str(n) for n in range(7)])
        assert (low[column], high[column]) == pytest.approx(summary.mean_interval)
        assert mean_interval(scores[:, column]) == (summary.mean, summary.mean_interval)


def test_bands_of_one_subject_are_undefined() -> None:
    low, high = mean_band(np.ones((1, 3)))
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_visits_of_one_subject_count_once() -> None:
    means, names = subject_means(np.array([[0.0, 1.0], [0.4, 0.4], [1.0, 0.0]]), ["b", "a", "b"])
    assert names == ("a", "b")
    np.testing.assert_allclose(means, [[0.4, 0.4], [0.5, 0.5]])
