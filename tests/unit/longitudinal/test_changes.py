"""Lesions that merge, split, touch and stay small."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from wmh_lora.cli.longitudinal import _KINDS
from wmh_lora.errors import ConfigError
from wmh_lora.longitudinal.align import align_visits
from wmh_lora.longitudinal.changes import CHANGES, FollowedLesion, Rules, follow_lesions
from wmh_lora.longitudinal.repeatability import boundary_sd_ml
from wmh_lora.volume import Volume

Probabilities = Sequence[np.ndarray | None]
SHAPE = (30, 30, 30)


def scan() -> Volume:
    data = np.random.default_rng(0).normal(100.0, 5.0, SHAPE).astype(np.float32)
    return Volume(data, np.eye(4))


def mask(*boxes: tuple[slice, slice, slice]) -> np.ndarray:
    drawn = np.zeros(SHAPE, np.uint8)
    for box in boxes:
        drawn[box] = 1
    return drawn


def box(start: int, stop: int, low: int = 10, high: int = 16) -> tuple[slice, slice, slice]:
    return slice(start, stop), slice(low, high), slice(low, high)


def follow(
    first: np.ndarray,
    second: np.ndarray,
    probabilities: Probabilities = (None, None),
    /,
    **rules: float,
) -> list[FollowedLesion]:
    scans = [scan(), scan()]
    alignment = align_visits(scans, register=False)
    lesions, labels = follow_lesions(
        scans, [first, second], probabilities, alignment, [(0, 1)], Rules(**rules)
    )
    assert labels.max() == len(lesions)
    return lesions


def kinds(lesions: list[FollowedLesion]) -> list[str]:
    return [lesion.changes[0].kind for lesion in lesions]


def test_lesions_that_merge_are_followed_as_one() -> None:
    (lesion,) = follow(mask(box(5, 10), box(12, 17)), mask(box(5, 17)))
    assert lesion.parts == (2, 1)
    assert lesion.changes[0].event == "merged"
    (lesion,) = follow(mask(box(5, 17)), mask(box(5, 10), box(12, 17)))
    assert lesion.changes[0].event == "split"


@pytest.mark.parametrize(
    ("gap", "expected"), [(0, ["stable"]), (1, ["vanished", "new"]), (3, ["vanished", "new"])]
)
def test_a_lesion_is_new_only_beyond_the_neighbour(gap: int, expected: list[str]) -> None:
    first, second = mask(box(4, 10)), mask(box(10 + gap, 16 + gap))
    assert sorted(kinds(follow(first, second))) == sorted(expected)


def test_corners_are_neighbours() -> None:
    first, second = mask(box(4, 10)), mask(box(10, 16, 16, 22))
    assert kinds(follow(first, second)) == ["stable"]


def test_lesions_side_by_side_stay_apart() -> None:
    both = mask(box(5, 10), box(11, 16))
    assert kinds(follow(both, both)) == ["stable", "stable"]


def test_specks_are_not_new_lesions() -> None:
    speck = mask((slice(5, 7), slice(5, 7), slice(5, 7)))
    assert kinds(follow(mask(), speck)) == ["too small"]
    assert kinds(follow(mask(), speck, min_lesion_ml=0.0)) == ["new"]


@pytest.mark.parametrize(
    ("level", "slices", "expected"),
    [(0.3, 10, "doubtful"), (0.3, 1, "doubtful"), (0.3, 0, "new"), (0.09, 10, "new")],
)
def test_what_the_other_visit_half_shows_is_doubtful(
    level: float, slices: int, expected: str
) -> None:
    lesion, empty = mask(box(5, 15)), mask()
    sure = 0.9 * lesion.astype(np.float32)
    pale = level * mask(box(5, 5 + slices)).astype(np.float32)
    assert kinds(follow(empty, lesion, [pale, sure])) == [expected]
    gone = {"new": "vanished"}.get(expected, expected)
    assert kinds(follow(lesion, empty, [sure, pale])) == [gone]
    assert kinds(follow(lesion, empty, [sure, None])) == ["vanished"]
    assert kinds(follow(lesion, lesion, [sure, pale])) == ["stable"]


def test_how_much_evidence_makes_doubt_is_a_rule() -> None:
    lesion = mask(box(5, 15))
    third = 0.3 * mask(box(5, 8)).astype(np.float32)
    for rule, value, expected in (
        ("min_share_with_evidence", 0.3, "doubtful"),
        ("min_share_with_evidence", 0.31, "new"),
        ("min_share_with_evidence", 0.0, "doubtful"),
        ("min_evidence", 0.31, "new"),
    ):
        assert kinds(follow(mask(), lesion, (third, None), **{rule: value})) == [expected]
        with pytest.raises(ConfigError, match=rule):
            Rules(**{rule: 1.1})
    (followed,) = follow(mask(), lesion, (third, None))
    np.testing.assert_allclose(followed.share_with_evidence, (0.3, 0.0))


def test_specks_are_too_small_before_they_are_doubtful() -> None:
    speck = mask((slice(5, 7), slice(5, 7), slice(5, 7)))
    pale = 0.3 * speck.astype(np.float32)
    assert kinds(follow(mask(), speck, [pale, None])) == ["too small"]


def test_growth_must_pass_volume_and_percentage() -> None:
    first, second = mask(box(5, 15)), mask(box(5, 19))  # 360 and 504 mm3
    free = dict(min_change_ml=0.1, min_change_percent=30.0)
    assert kinds(follow(first, second, **free)) == ["grown"]
    assert kinds(follow(second, first, **free)) == ["shrunk"]
    for tighter in ({"min_change_ml": 0.15}, {"min_change_percent": 41.0}):
        assert kinds(follow(first, second, **{**free, **tighter})) == ["stable"]


def test_the_limit_says_whether_chance_explains_a_change() -> None:
    first, second = mask(box(5, 15)), mask(box(5, 19))
    for sd_voxels, within in ((0.29, True), (0.1, False), (0.0, False)):
        (lesion,) = follow(first, second, boundary_sd_voxels=sd_voxels)
        assert lesion.changes[0].kind == "grown"
        assert lesion.changes[0].within_repeatability is within


def test_the_deviation_of_a_ball_is_its_area_times_that_of_its_boundary() -> None:
    grid = np.indices((41, 41, 41)) - 20
    ball = (np.sum(grid**2, axis=0) <= 15**2).astype(np.int32)
    volume = Volume(ball.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
    (found,) = boundary_sd_ml(ball, 1, volume, 0.29)
    assert found == pytest.approx(4 * np.pi * 30**2 * 0.29 * 2 / 1000, rel=0.05)
    assert boundary_sd_ml(0 * ball, 0, volume, 0.29).shape == (0,)


def test_the_command_tells_every_kind_of_change() -> None:
    assert {*_KINDS, "absent"} == CHANGES.keys()
