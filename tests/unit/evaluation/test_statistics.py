"""Summaries and comparisons, against SciPy and against slow forms of the same definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wmh_lora.evaluation.statistics import (
    compare_paired,
    holm_adjusted,
    mean_shift,
    summarise,
)

NAN = math.nan


def labels(count: int) -> list[str]:
    return [f"s{i}" for i in range(count)]


class TestSummary:
    @pytest.mark.parametrize("statistic", ["mean", "median"])
    def test_agrees_with_scipy(self, rng: np.random.Generator, statistic: str) -> None:
        values = rng.lognormal(0.0, 1.0, 41)
        summary = summarise(values, labels(41))
        oracle = stats.bootstrap(
            (values,),
            getattr(np, statistic),
            n_resamples=10_000,
            method="percentile",
            rng=np.random.default_rng(1),
            batch=1000,
        ).confidence_interval
        assert getattr(summary, statistic) == pytest.approx(getattr(np, statistic)(values))
        ours = getattr(summary, f"{statistic}_interval")
        assert ours == pytest.approx((oracle.low, oracle.high), rel=0.03)

    def test_resamples_subjects_and_not_scans(self, rng: np.random.Generator) -> None:
        """Ten copies of each scan bring no knowledge, so they must not narrow the interval."""
        values = rng.normal(0.0, 1.0, 12)
        once = summarise(values, labels(12))
        often = summarise(np.repeat(values, 10), np.repeat(labels(12), 10).tolist())
        assert often.scans == 120
        assert often.subjects == once.subjects == 12
        assert often.mean_interval == pytest.approx(once.mean_interval)
        assert often.median_interval == pytest.approx(once.median_interval)

    @given(
        st.lists(st.integers(0, 5), min_size=2, max_size=9),
        st.lists(st.integers(0, 3), min_size=9, max_size=9),
    )
    def test_intervals_are_those_of_resampled_lists(
        self, values: list[int], owners: list[int]
    ) -> None:
        """The same draws, carried out by copying scans into lists."""
        subjects = [f"s{o}" for o in owners[: len(values)]]
        count = len(set(subjects))
        if count < 2:
            return
        summary = summarise(values, subjects, resamples=50, seed=3)
        draws = np.random.default_rng(3).multinomial(count, np.full(count, 1 / count), size=50)
        order = sorted(set(subjects))
        drawn = [
            list(
                itertools.chain.from_iterable(
                    [v] * int(draw[order.index(s)]) for v, s in zip(values, subjects, strict=True)
                )
            )
            for draw in draws
        ]
        for numbers, interval in (
            ([np.mean(d) for d in drawn], summary.mean_interval),
            ([np.median(d) for d in drawn], summary.median_interval),
        ):
            assert interval == pytest.approx(tuple(np.percentile(numbers, (2.5, 97.5))))

    def test_undefined_values_are_counted_and_left_out(self) -> None:
        summary = summarise([0.2, NAN, 0.4, NAN], ["a", "b", "b", "c"])
        assert (summary.scans, summary.subjects, summary.undefined) == (2, 2, 2)
        assert summary.mean == pytest.approx(0.3)
        assert (summary.minimum, summary.maximum) == (0.2, 0.4)

    def test_nothing_defined(self) -> None:
        summary = summarise([NAN, NAN], ["a", "b"])
        assert (summary.scans, summary.undefined) == (0, 2)
        assert math.isnan(summary.mean)
        assert math.isnan(summary.median_interval.low)

    def test_one_subject_has_no_interval(self) -> None:
        summary = summarise([0.2, 0.4], ["a", "a"])
        assert summary.mean == pytest.approx(0.3)
        assert math.isnan(summary.mean_interval.low)

    def test_equal_input_gives_equal_intervals(self) -> None:
        assert summarise([1.0, 2.0, 4.0], labels(3)) == summarise([1.0, 2.0, 4.0], labels(3))

    def test_lengths_must_agree(self) -> None:
        with pytest.raises(ValueError, match="subjects"):
            summarise([1.0], [])


class TestShift:
    def test_agrees_with_scipy(self, rng: np.random.Generator) -> None:
        first, second = rng.normal(0.0, 1.0, 30), rng.normal(1.0, 2.0, 40)
        difference, interval = mean_shift(first, labels(30), second, labels(40))
        oracle = stats.bootstrap(
            (first, second),
            lambda a, b, axis: b.mean(axis=axis) - a.mean(axis=axis),
            n_resamples=10_000,
            method="percentile",
            rng=np.random.default_rng(1),
            batch=1000,
        ).confidence_interval
        assert difference == pytest.approx(second.mean() - first.mean())
        assert interval == pytest.approx((oracle.low, oracle.high), abs=0.06)

    def test_cohorts_are_resampled_apart(self) -> None:
        """The same numbers twice: drawn together, every difference would be 0."""
        values = [0.0, 1.0, 2.0, 5.0]
        _, interval = mean_shift(values, labels(4), values, labels(4))
        assert interval.low < -0.5
        assert interval.high > 0.5

    def test_an_empty_side(self) -> None:
        difference, interval = mean_shift([NAN], ["a"], [1.0, 2.0], ["b", "c"])
        assert math.isnan(difference)
        assert math.isnan(interval.low)


class TestComparison:
    def test_agrees_with_scipy(self, rng: np.random.Generator) -> None:
        first = rng.normal(0.0, 1.0, 25)
        second = first + rng.normal(0.3, 1.0, 25)
        result = compare_paired(first, second, labels(25))
        assert result.p_value == pytest.approx(stats.wilcoxon(second, first).pvalue)
        assert result.mean_difference == pytest.approx((second - first).mean())
        assert result.interval.low < result.mean_difference < result.interval.high

    def test_effect_size_by_hand(self) -> None:
        # differences 1, 2, -3, 4, 0: ranks 1, 2, 3, 4, so (1 + 2 + 4 - 3) / 10
        result = compare_paired([0.0] * 5, [1.0, 2.0, -3.0, 4.0, 0.0], labels(5))
        assert result.rank_biserial == pytest.approx(0.4)
        assert result.nonzero == 4
        assert result.smallest_p == 0.125

    def test_swapping_the_methods_turns_the_signs(self) -> None:
        a, b = [1.0, 2.0, 4.0, 8.0, 3.0], [2.0, 1.5, 5.0, 9.5, 7.0]
        forth, back = compare_paired(a, b, labels(5)), compare_paired(b, a, labels(5))
        assert forth.rank_biserial == -back.rank_biserial
        assert forth.mean_difference == -back.mean_difference
        assert forth.p_value == back.p_value

    def test_identical_methods(self) -> None:
        result = compare_paired([0.5, 0.7, NAN], [0.5, 0.7, NAN], labels(3))
        assert (result.mean_difference, result.p_value, result.rank_biserial) == (0.0, 1.0, 0.0)
        assert result.undefined == 1
        assert tuple(result.interval) == (0.0, 0.0)

    def test_visits_of_one_subject_count_once(self) -> None:
        first = np.zeros(12)
        second = np.tile([1.0, 2.0, 3.0, -1.5], 3)
        subjects = np.tile(["a", "b", "c", "d"], 3).tolist()
        thrice = compare_paired(first, second, subjects)
        once = compare_paired(first[:4], second[:4], subjects[:4])
        assert thrice.p_value == once.p_value
        assert thrice.interval == pytest.approx(once.interval)
        assert (thrice.scans, thrice.subjects) == (12, 4)

    def test_pairs_with_an_undefined_value_are_left_out(self) -> None:
        result = compare_paired([1.0, NAN, 3.0], [2.0, 2.0, NAN], labels(3))
        assert (result.scans, result.undefined) == (1, 2)
        assert (result.mean_first, result.mean_second) == (1.0, 2.0)

    def test_nothing_to_compare(self) -> None:
        result = compare_paired([NAN], [1.0], ["a"])
        assert result.scans == 0
        assert math.isnan(result.p_value)


def test_holm() -> None:
    assert holm_adjusted([0.01, NAN, 0.04, 0.03]) == pytest.approx(
        [0.03, NAN, 0.06, 0.06], nan_ok=True
    )
    assert holm_adjusted([0.6, 0.9]) == [1.0, 1.0]
