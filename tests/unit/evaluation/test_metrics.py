"""The challenge's metrics: hand-made cases, edge cases, and slow independent oracles."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from wmh_lora.errors import ConfigError, GridMismatchError
from wmh_lora.evaluation import metrics

UNIT = (1.0, 1.0, 1.0)
PAIRWISE = (
    metrics.dice,
    metrics.precision,
    metrics.recall,
    metrics.avd_percent,
    metrics.lesion_recall,
    metrics.lesion_precision,
    metrics.lesion_f1,
)

Mask = NDArray[np.uint8]


def volume(*voxels: tuple[int, int, int], shape: tuple[int, int, int] = (6, 6, 4)) -> Mask:
    """A mask with single voxels set."""
    mask = np.zeros(shape, np.uint8)
    for voxel in voxels:
        mask[voxel] = 1
    return mask


def slow_components(mask: NDArray[Any]) -> list[set[tuple[int, ...]]]:
    """26-connected components by flood fill, voxel by voxel."""
    left = {tuple(int(n) for n in voxel) for voxel in np.argwhere(mask)}
    steps = [step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)]
    components = []
    while left:
        component, border = set(), {min(left)}
        while border:
            left -= border
            component |= border
            reached = {
                tuple(a + b for a, b in zip(v, s, strict=True)) for v in border for s in steps
            }
            border = reached & left
        components.append(component)
    return components


def slow_boundary(mask: NDArray[Any]) -> list[tuple[int, int, int]]:
    """Foreground voxels with a background voxel among their eight in-plane neighbours."""
    rows, columns, slices = mask.shape
    found = []
    for i, j, k in itertools.product(range(rows), range(columns), range(slices)):
        around = [
            mask[i + a, j + b, k]
            for a, b in itertools.product((-1, 0, 1), repeat=2)
            if 0 <= i + a < rows and 0 <= j + b < columns
        ]
        if mask[i, j, k] and not all(around):
            found.append((i, j, k))
    return found


def slow_hd95(
    reference: NDArray[Any], prediction: NDArray[Any], spacing_mm: tuple[float, ...]
) -> float:
    """All pairs of boundary voxels, without any search structure."""
    a, b = slow_boundary(reference), slow_boundary(prediction)
    if not a or not b:
        return math.nan

    def directed(start: list[tuple[int, int, int]], goal: list[tuple[int, int, int]]) -> float:
        nearest = [
            min(
                math.sqrt(sum(((p - q) * s) ** 2 for p, q, s in zip(u, v, spacing_mm, strict=True)))
                for v in goal
            )
            for u in start
        ]
        nearest.sort()
        position = 0.95 * (len(nearest) - 1)
        low = int(position)
        high = min(low + 1, len(nearest) - 1)
        return nearest[low] + (position - low) * (nearest[high] - nearest[low])

    return max(directed(a, b), directed(b, a))


@st.composite
def mask_pairs(draw: st.DrawFn) -> tuple[Mask, Mask]:
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    densities = draw(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)))
    first, second = ((rng.random(shape) < d).astype(np.uint8) for d in densities)
    return first, second


class TestDice:
    def test_half_overlap(self) -> None:
        assert metrics.dice(volume((0, 0, 0), (1, 0, 0)), volume((1, 0, 0), (2, 0, 0))) == 0.5

    def test_identity_and_disjoint(self) -> None:
        mask = volume((2, 2, 1), (3, 3, 3))
        assert metrics.dice(mask, mask) == 1.0
        assert metrics.dice(mask, volume((0, 0, 0))) == 0.0

    def test_no_smoothing_on_one_empty_mask(self) -> None:
        assert metrics.dice(volume((0, 0, 0)), volume()) == 0.0

    def test_both_empty_is_undefined(self) -> None:
        assert math.isnan(metrics.dice(volume(), volume()))

    def test_counts_do_not_overflow_small_integer_types(self) -> None:
        mask = np.ones((20, 20, 2), np.uint8)
        assert metrics.dice(mask, mask) == 1.0
        assert metrics.avd_percent(mask[:1], mask[:1]) == 0.0


class TestVoxelShares:
    def test_precision_and_recall(self) -> None:
        reference = volume((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0))
        prediction = volume((3, 0, 0), (4, 0, 0))
        assert metrics.precision(reference, prediction) == 0.5
        assert metrics.recall(reference, prediction) == 0.25

    def test_undefined_when_there_is_nothing_to_share(self) -> None:
        assert math.isnan(metrics.precision(volume((0, 0, 0)), volume()))
        assert math.isnan(metrics.recall(volume(), volume((0, 0, 0))))


class TestVolumeDifference:
    def test_is_relative_to_the_reference(self) -> None:
        one, three = volume((0, 0, 0)), volume((0, 0, 0), (1, 1, 1), (4, 4, 2))
        assert metrics.avd_percent(one, three) == pytest.approx(200.0)
        assert metrics.avd_percent(three, one) == pytest.approx(200.0 / 3.0)

    def test_undefined_on_an_empty_reference(self) -> None:
        assert math.isnan(metrics.avd_percent(volume(), volume((0, 0, 0))))


class TestHausdorff:
    def test_two_voxels_in_millimetres(self) -> None:
        distance = metrics.hd95(volume((1, 1, 1)), volume((1, 4, 2)), (1.0, 2.0, 3.0))
        assert distance == pytest.approx(math.sqrt(6.0**2 + 3.0**2))

    def test_identical_masks(self) -> None:
        mask = volume((1, 1, 1), (1, 2, 1), (4, 4, 3))
        assert metrics.hd95(mask, mask, UNIT) == 0.0

    def test_directions_are_not_pooled(self) -> None:
        """100 voxels agree, one far voxel is extra: pooled, it would vanish below 95 %."""
        reference = np.zeros((40, 40, 1), np.uint8)
        reference[5:7, 0:10] = 1  # 20 boundary voxels
        prediction = reference.copy()
        prediction[30, 0:3] = 1  # 3 of 23: 13 % of one direction, 7 % of both
        expected = slow_hd95(reference, prediction, UNIT)
        assert metrics.hd95(reference, prediction, UNIT) == pytest.approx(expected)
        assert expected > 20.0

    def test_inner_voxels_do_not_count(self) -> None:
        solid = np.zeros((9, 9, 1), np.uint8)
        solid[2:7, 2:7] = 1
        hollow = solid.copy()
        hollow[4, 4] = 0
        # the hole makes a new boundary, one voxel inside the old one
        assert metrics.boundary(solid).sum() == 16
        assert metrics.boundary(hollow).sum() == 24

    def test_erosion_stays_within_slices(self) -> None:
        column = np.zeros((5, 5, 5), np.uint8)
        column[1:4, 1:4, 2] = 1
        assert metrics.boundary(column).sum() == 8
        assert metrics.boundary(column, slice_axis=0).sum() == 9

    def test_outside_the_image_counts_as_foreground(self) -> None:
        corner = np.zeros((5, 5, 1), np.uint8)
        corner[:2, :2] = 1
        assert not metrics.boundary(corner)[0, 0, 0]
        assert metrics.boundary(corner).sum() == 3

    def test_undefined_without_boundaries(self) -> None:
        some, full = volume((1, 1, 1)), np.ones((6, 6, 4), np.uint8)
        for a, b in ((volume(), some), (some, volume()), (volume(), volume()), (full, full)):
            assert math.isnan(metrics.hd95(a, b, UNIT))

    @given(mask_pairs())
    def test_agrees_with_all_pairs(self, pair: tuple[Mask, Mask]) -> None:
        spacing = (0.9, 1.1, 3.0)
        expected = slow_hd95(*pair, spacing)
        assert metrics.hd95(*pair, spacing) == pytest.approx(expected, nan_ok=True)

    @pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, math.nan, 1.0)])
    def test_refuses_an_impossible_spacing(self, spacing: tuple[float, ...]) -> None:
        with pytest.raises(ConfigError, match="spacing_mm"):
            metrics.hd95(volume((0, 0, 0)), volume((0, 0, 0)), spacing)


class TestLesions:
    def test_recall_counts_touched_reference_lesions(self) -> None:
        reference = volume((0, 0, 0), (3, 3, 1), (3, 3, 2), (5, 0, 3))
        prediction = volume((3, 3, 2), (5, 5, 0))
        assert metrics.lesion_recall(reference, prediction) == pytest.approx(1 / 3)
        assert metrics.lesion_precision(reference, prediction) == 0.5
        assert metrics.lesion_f1(reference, prediction) == pytest.approx(0.4)

    def test_corners_connect(self) -> None:
        diagonal = volume((0, 0, 0), (1, 1, 1), (2, 2, 2))
        assert metrics.label_lesions(diagonal)[1] == 1

    def test_recall_and_precision_use_their_own_components(self) -> None:
        """One prediction that bridges two lesions is one true lesion, not two."""
        reference = volume((0, 0, 0), (4, 0, 0))
        bridge = volume(*((i, 0, 0) for i in range(5)), (0, 5, 3))
        assert metrics.lesion_recall(reference, bridge) == 1.0
        assert metrics.lesion_precision(reference, bridge) == 0.5

    def test_empty_masks_follow_the_official_script(self) -> None:
        some = volume((1, 1, 1))
        assert metrics.lesion_recall(volume(), some) == 1.0
        assert metrics.lesion_precision(some, volume()) == 1.0
        assert metrics.lesion_f1(some, volume()) == 0.0
        assert metrics.lesion_f1(volume(), some) == 0.0
        assert metrics.lesion_f1(volume(), volume()) == 1.0

    @given(mask_pairs())
    def test_agrees_with_flood_fill(self, pair: tuple[Mask, Mask]) -> None:
        reference, prediction = pair

        def share(lesions: Mask, other: Mask) -> float:
            components = slow_components(lesions)
            hit = [c for c in components if any(other[v] for v in c)]
            return len(hit) / len(components) if components else 1.0

        assert metrics.label_lesions(reference)[1] == len(slow_components(reference))
        assert metrics.lesion_recall(reference, prediction) == share(reference, prediction)
        assert metrics.lesion_precision(reference, prediction) == share(prediction, reference)


class TestChallengeMasks:
    def test_other_pathology_is_removed_before_components_are_counted(self) -> None:
        reference = np.zeros((7, 3, 1), np.uint8)
        reference[0, 1], reference[3, 1] = 1, 2
        prediction = np.zeros_like(reference)
        prediction[:, 1] = 1  # one component, which label 2 cuts in two
        scores = metrics.evaluate(reference, prediction, UNIT)
        assert scores.lesion_precision == 0.5
        assert scores.prediction_ml == pytest.approx(0.006)
        assert scores.reference_ml == pytest.approx(0.001)

    def test_binarises_labels_and_probabilities(self) -> None:
        reference = np.array([[[0, 1, 2, 3]]])
        probability = np.array([[[0.5, 0.49, 0.9, 0.7]]], np.float32)
        reference_mask, prediction_mask = metrics.challenge_masks(reference, probability)
        assert reference_mask.tolist() == [[[False, True, False, False]]]
        assert prediction_mask.tolist() == [[[True, False, False, True]]]

    def test_accepts_references_stored_as_floating_point(self) -> None:
        reference = np.array([[[0.0, 1.0000001, 1.9999999]]])
        reference_mask, prediction_mask = metrics.challenge_masks(reference, reference > 0)
        assert reference_mask.tolist() == prediction_mask.tolist() == [[[False, True, False]]]


def test_evaluate_collects_every_measure() -> None:
    reference, prediction = volume((0, 0, 0), (1, 0, 0)), volume((1, 0, 0), (2, 0, 0))
    scores = metrics.evaluate(reference, prediction, (1.0, 1.0, 5.0))
    assert scores.to_dict() == {
        "dice": 0.5,
        "hd95_mm": pytest.approx(metrics.hd95(reference, prediction, (1.0, 1.0, 5.0))),
        "avd_percent": 0.0,
        "lesion_recall": 1.0,
        "lesion_f1": 1.0,
        "lesion_precision": 1.0,
        "precision": 0.5,
        "recall": 0.5,
        "reference_ml": 0.01,
        "prediction_ml": 0.01,
        "reference_lesions": 1,
        "prediction_lesions": 1,
    }


def official(
    labels: NDArray[Any], prediction: NDArray[Any], spacing_mm: tuple[float, ...]
) -> dict[str, float]:
    """The challenge's five measures once more, voxel by voxel and from its description alone."""
    reference = {tuple(v) for v in np.argwhere(labels == 1).tolist()}
    found = {tuple(v) for v in np.argwhere((prediction > 0) & (labels != 2)).tolist()}
    reference_mask, found_mask = np.zeros(labels.shape, bool), np.zeros(labels.shape, bool)
    for voxels, mask in ((reference, reference_mask), (found, found_mask)):
        for voxel in voxels:
            mask[voxel] = True

    def share(mask: NDArray[Any], other: set[tuple[int, ...]]) -> float:
        components = slow_components(mask)
        touched = [component for component in components if component & other]
        return len(touched) / len(components) if components else 1.0

    recall, precision = share(reference_mask, found), share(found_mask, reference)
    total = len(reference) + len(found)
    return {
        "dice": 2 * len(reference & found) / total if total else math.nan,
        "hd95_mm": slow_hd95(reference_mask, found_mask, spacing_mm),
        "avd_percent": abs(len(found) - len(reference)) / len(reference) * 100
        if reference
        else math.nan,
        "lesion_recall": recall,
        "lesion_f1": 2 * recall * precision / (recall + precision) if recall + precision else 0.0,
    }


@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.floats(0.0, 0.3),
    predicted=st.floats(0.0, 0.3),
    margins=st.tuples(*(st.integers(0, 4) for _ in range(6))),
)
def test_evaluate_is_the_official_evaluation(
    seed: int, density: float, predicted: float, margins: tuple[int, ...]
) -> None:
    """Labels 0 to 2 anywhere in a larger image, at its borders or not, and empty masks."""
    rng = np.random.default_rng(seed)
    around = [margins[i : i + 2] for i in (0, 2, 4)]
    labels = np.pad(rng.choice(3, (5, 6, 3), p=(1 - density, density / 2, density / 2)), around)
    prediction = np.pad((rng.random((5, 6, 3)) < predicted).astype(np.uint8), around)
    spacing = (0.9, 1.1, 3.0)
    scores = metrics.evaluate(labels, prediction, spacing)
    expected = official(labels, prediction, spacing)
    assert {key: getattr(scores, key) for key in expected} == pytest.approx(expected, nan_ok=True)
    assert scores.reference_lesions == len(slow_components(labels == 1))
    assert scores.prediction_lesions == len(slow_components((prediction > 0) & (labels != 2)))


@pytest.mark.parametrize("metric", PAIRWISE)
def test_shapes_must_agree(metric: Any) -> None:
    with pytest.raises(GridMismatchError, match=r"\(6, 6, 4\)"):
        metric(volume(), volume(shape=(6, 6, 5)))


@pytest.mark.parametrize("metric", PAIRWISE)
@given(pair=mask_pairs())
def test_measures_stay_in_range(metric: Any, pair: tuple[Mask, Mask]) -> None:
    value = metric(*pair)
    assert math.isnan(value) or value >= 0.0
    if metric is not metrics.avd_percent:
        assert math.isnan(value) or value <= 1.0
