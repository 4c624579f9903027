"""A head's movement is found again; of no movement none is made up."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.followed_heads import FIRST, MOVED, coarse_visit, movement
from wmh_lora.errors import ConfigError
from wmh_lora.registration import rigid_movement, turn_and_shift


def test_turn_and_shift() -> None:
    turn_deg, shift_mm = turn_and_shift(movement((0.0, 7.0, 0.0), (3.0, 4.0, 0.0)), np.zeros(3))
    assert turn_deg == pytest.approx(7.0)
    assert shift_mm == pytest.approx(5.0)
    assert turn_and_shift(movement((0.0, 1e-6, 0.0)), np.zeros(3))[0] == pytest.approx(1e-6)


def test_a_movement_is_found_within_a_focus_alone() -> None:
    one, other = coarse_visit("a", FIRST), coarse_visit("b", FIRST, MOVED, seed=2)
    middle = np.indices(one.mask.shape) - (np.array(one.mask.shape)[:, None, None, None] - 1) / 2
    brain = (np.sum((middle * 4.0 / np.array([66, 80, 58])[:, None, None, None]) ** 2, 0)) < 1
    found = rigid_movement(one.volume, other.volume, focus=brain)
    for corner in np.array([[60, 0, 0, 1], [0, -70, 0, 1], [0, 0, 50, 1]], dtype=float):
        assert np.linalg.norm((found - MOVED) @ corner) < 0.5
    np.testing.assert_array_equal(found, rigid_movement(one.volume, other.volume, focus=brain))


def test_without_simpleitk_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = coarse_visit("a", FIRST)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r"pip install 'wmh-lora\[registration\]'"):
        rigid_movement(one.volume, one.volume)
