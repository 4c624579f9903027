"""Planted changes are found as such, whatever the movement, the grid and the order of visits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.followed_heads import FIRST, MOVED, SECOND, kinds_at, movement, visit
from wmh_lora.errors import ConfigError, DataError, GridMismatchError
from wmh_lora.longitudinal.changes import Rules
from wmh_lora.longitudinal.study import FollowUp, compare_visits

ALL = [*FIRST, (0.0, 50.0, 15.0)]
EXPECTED = ["stable", "grown", "shrunk", "vanished", "new"]


@pytest.fixture(scope="module")
def moved() -> FollowUp:
    return compare_visits([visit("a", FIRST), visit("b", SECOND, MOVED, seed=2)])


def points() -> np.ndarray:
    corners = np.meshgrid((-70, 0, 70), (-85, 0, 85), (-60, 0, 60), [1.0])
    return np.stack([axis.ravel() for axis in corners])


def test_the_movement_is_found_and_halved(moved: FollowUp) -> None:
    first, second = moved.alignment.to_visit
    left_mm = np.linalg.norm(((second @ np.linalg.inv(first) - MOVED) @ points())[:3], axis=0)
    assert left_mm.max() < 0.5
    np.testing.assert_allclose(first, np.linalg.inv(second), atol=1e-8)
    for pose in (first, second):
        np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    assert moved.alignment.inconsistency_mm[0] == 0.0
    assert 0.0 < (moved.alignment.inconsistency_mm[1] or 0.0) < 0.5


def test_planted_changes_are_found(moved: FollowUp) -> None:
    assert kinds_at(moved, dict.fromkeys(ALL, 0.0)) == EXPECTED
    assert len(moved.lesions) == len(ALL)


def test_volumes_are_those_of_the_masks(moved: FollowUp) -> None:
    for i, one in enumerate(moved.visits):
        expected = int(one.mask.sum()) * one.volume.voxel_volume_ml
        assert moved.volumes[i].volume_ml == pytest.approx(expected)
        assert sum(lesion.volume_ml[i] for lesion in moved.lesions) == pytest.approx(expected)
        assert moved.volumes[i].common_ml == pytest.approx(expected)
    (total,) = moved.totals
    assert total.change_ml == pytest.approx(moved.volumes[1].volume_ml - moved.volumes[0].volume_ml)
    assert total.percent == pytest.approx(100 * total.change_ml / moved.volumes[0].volume_ml)


@pytest.mark.slow
def test_swapped_visits_give_the_opposite(moved: FollowUp) -> None:
    swapped = compare_visits(moved.visits[::-1])
    opposite = {"new": "vanished", "vanished": "new", "grown": "shrunk", "shrunk": "grown"}
    np.testing.assert_allclose(swapped.alignment.affine, moved.alignment.affine, atol=1e-6)
    np.testing.assert_allclose(
        swapped.alignment.to_visit[0], moved.alignment.to_visit[1], atol=1e-6
    )
    assert swapped.totals[0].change_ml == pytest.approx(-moved.totals[0].change_ml)
    assert swapped.totals[0].limit_ml == pytest.approx(moved.totals[0].limit_ml)
    np.testing.assert_array_equal(swapped.labels, moved.labels)
    for one, other in zip(moved.lesions, swapped.lesions, strict=True):
        (before,), (after,) = one.changes, other.changes
        assert after.kind == opposite.get(before.kind, before.kind)
        assert after.change_ml == pytest.approx(-before.change_ml)


@pytest.mark.slow
def test_identical_scans_do_not_change() -> None:
    one = visit("a", FIRST)
    result = compare_visits([one, replace(one, name="b")])
    assert result.totals[0].change_ml == 0.0
    assert result.totals[0].within_repeatability
    assert {lesion.changes[0].kind for lesion in result.lesions} == {"stable"}
    turned = result.alignment.to_visit[1] @ np.linalg.inv(result.alignment.to_visit[0])
    assert np.linalg.norm(((turned - np.eye(4)) @ points())[:3], axis=0).max() < 0.1


@pytest.mark.slow
def test_other_voxels_and_axes_give_the_same_changes() -> None:
    second = visit(
        "b",
        SECOND,
        MOVED,
        shape=(48, 56, 80),
        spacing_mm=(3.2, 3.0, 2.5),
        axes=(2, 0, 1),
        flips=(-1.0, 1.0, -1.0),
    )
    result = compare_visits([visit("a", FIRST), second])
    assert kinds_at(result, dict.fromkeys(ALL, 0.0)) == EXPECTED
    found = result.alignment.to_visit[1] @ np.linalg.inv(result.alignment.to_visit[0])
    assert np.linalg.norm(((found - MOVED) @ points())[:3], axis=0).max() < 0.7


def test_what_a_visit_does_not_show_is_not_new() -> None:
    high = {**SECOND, (10.0, 0.0, 52.0): 6.0}
    first, second = visit("a", FIRST), visit("b", high)
    data, mask = first.volume.data.copy(), first.mask.copy()
    whole = compare_visits([first, second], register=False)
    assert kinds_at(whole, {(10.0, 0.0, 52.0): 0.0}) == ["new"]
    cut = replace(first, volume=replace(first.volume, data=data[:, :, :44]), mask=mask[:, :, :44])
    result = compare_visits([cut, second], register=False)
    assert kinds_at(result, {(10.0, 0.0, 52.0): 0.0}) == ["not assessable"]
    assert kinds_at(result, dict.fromkeys(ALL, 0.0)) == EXPECTED
    assert result.volumes[1].common_ml < result.volumes[1].volume_ml
    assert result.totals[0].change_ml < whole.totals[0].change_ml
    padded = data.copy()
    padded[:, :, 44:] = -1.0
    padded[:, :, 0] = padded[0] = padded[-1] = padded[:, 0] = padded[:, -1] = -1.0
    filled = replace(first, volume=replace(first.volume, data=padded))
    result = compare_visits([filled, second], register=False)
    assert kinds_at(result, {(10.0, 0.0, 52.0): 0.0}) == ["not assessable"]


def test_three_visits_meet_in_their_mean_place() -> None:
    visits = [visit("a", FIRST), visit("b", FIRST), visit("c", SECOND)]
    result = compare_visits(visits, register=False)
    assert [(t.before, t.after) for t in result.totals] == [(0, 1), (1, 2), (0, 2)]
    assert result.totals[0].change_ml == 0.0
    assert kinds_at(result, dict.fromkeys(ALL, 0.0), 0) == ["stable"] * 4 + ["absent"]
    assert kinds_at(result, dict.fromkeys(ALL, 0.0), 1) == EXPECTED
    assert kinds_at(result, dict.fromkeys(ALL, 0.0), 2) == EXPECTED


def test_a_given_variation_sets_the_limit() -> None:
    visits = [visit("a", FIRST), visit("b", SECOND)]
    result = compare_visits(visits, register=False, within_subject_cv_percent=5.0)
    mean_ml = (result.volumes[0].volume_ml + result.volumes[1].volume_ml) / 2
    assert result.totals[0].limit_ml == pytest.approx(1.96 * np.sqrt(2) * 0.05 * mean_ml)


def test_no_lesions_at_all() -> None:
    result = compare_visits([visit("a", {}), visit("b", {})], register=False)
    assert result.lesions == ()
    assert result.totals[0].percent is None
    assert result.totals[0].within_repeatability


def test_different_voxel_sizes_are_pointed_out() -> None:
    coarse = visit("b", FIRST, shape=(42, 50, 36), spacing_mm=(4.0, 4.0, 4.0))
    result = compare_visits([visit("a", FIRST), coarse], register=False)
    assert any("different size" in text for text in result.warnings)


def test_what_cannot_be_compared_is_refused() -> None:
    one = visit("a", FIRST)
    with pytest.raises(ConfigError, match="Two or more"):
        compare_visits([one])
    with pytest.raises(ConfigError, match="distinct"):
        compare_visits([one, one])
    with pytest.raises(GridMismatchError, match="own grid"):
        compare_visits([one, replace(one, name="b", mask=one.mask[1:])])
    far = visit("b", FIRST, movement(shift_mm=(150.0, 0.0, 0.0)))
    with pytest.raises(DataError, match="share only"):
        compare_visits([one, far], register=False)
    with pytest.raises(ConfigError, match="zero or more"):
        Rules(min_change_ml=-1.0)


def test_names_that_are_no_part_of_a_file_name_are_refused() -> None:
    visits = [visit(name, FIRST) for name in ("2020/01", "2021")]
    with pytest.raises(ConfigError, match="2020/01"):
        compare_visits(visits)
