"""Agreement of volumes, against published worked examples and the definitions by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from wmh_lora.evaluation.agreement import agree, bland_altman, ccc, icc_2_1

# Shrout & Fleiss (1979), table 2: six targets, four judges.
SHROUT_FLEISS = [
    [9, 2, 5, 8],
    [6, 1, 3, 2],
    [8, 4, 6, 8],
    [7, 1, 2, 6],
    [10, 5, 6, 9],
    [6, 2, 4, 7],
]


class TestBlandAltman:
    def test_by_hand(self) -> None:
        reference = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
        prediction = reference + np.array([0.5, -0.5, 1.0, 0.0, 1.5])
        result = bland_altman(reference, prediction)
        sd = math.sqrt((0.0 + 1.0 + 0.25 + 0.25 + 1.0) / 4)
        t = 2.776445  # 97.5 % point of t on 4 degrees of freedom, from a printed table
        assert result.bias.value == pytest.approx(0.5)
        assert result.sd == pytest.approx(sd)
        assert result.upper.value == pytest.approx(0.5 + 1.959964 * sd)
        assert result.lower.value == pytest.approx(0.5 - 1.959964 * sd)
        assert result.bias.interval.high == pytest.approx(0.5 + t * sd / math.sqrt(5))
        error = sd * math.sqrt(1 / 5 + 1.959964**2 / 8)
        assert result.upper.interval.low == pytest.approx(result.upper.value - t * error)
        assert result.lower.interval.high == pytest.approx(result.lower.value + t * error)

    def test_error_of_a_limit_covers_as_announced(self, rng: np.random.Generator) -> None:
        """Of 400 samples, some 95 % of the intervals hold the true limit."""
        held = 0
        for _ in range(400):
            differences = rng.normal(0.3, 2.0, 40)
            interval = bland_altman(np.zeros(40), differences).upper.interval
            held += interval.low <= 0.3 + 1.959964 * 2.0 <= interval.high
        assert 0.92 <= held / 400 <= 0.98

    def test_proportional_bias(self, rng: np.random.Generator) -> None:
        reference = rng.uniform(1.0, 40.0, 50)
        prediction = 1.2 * reference + rng.normal(0.0, 1.0, 50)
        result = bland_altman(reference, prediction)
        fit = stats.linregress((reference + prediction) / 2, prediction - reference)
        assert result.slope.value == pytest.approx(fit.slope)
        assert result.slope_p == pytest.approx(fit.pvalue)
        assert result.slope.interval.low > 0.15

    @pytest.mark.parametrize("n", [0, 1, 2])
    def test_too_few(self, n: int) -> None:
        result = bland_altman(np.arange(n), np.arange(n) * 1.5)
        assert math.isnan(result.bias.value) is (n == 0)
        assert math.isnan(result.sd) is (n < 2)
        assert math.isnan(result.slope.value)

    def test_identical(self) -> None:
        result = bland_altman([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
        assert result.bias.interval == (0.0, 0.0)
        assert (result.slope.value, result.slope_p) == (0.0, 1.0)


class TestIcc:
    def test_shrout_and_fleiss(self) -> None:
        """0.29 is in their paper; R's psych::ICC gives the interval 0.019 to 0.76."""
        result = icc_2_1(SHROUT_FLEISS)
        assert result.value == pytest.approx(0.29, abs=0.005)
        assert result.interval.low == pytest.approx(0.019, abs=0.0005)
        assert result.interval.high == pytest.approx(0.761, abs=0.0005)

    def test_absolute_agreement_sees_a_shift(self) -> None:
        x = np.array([1.0, 3.0, 5.0, 9.0])
        assert icc_2_1(np.column_stack([x, x])).value == pytest.approx(1.0)
        assert icc_2_1(np.column_stack([x, x])).interval == (1.0, 1.0)
        assert icc_2_1(np.column_stack([x, x + 3.0])).value < 0.8

    def test_does_not_depend_on_unit_or_order(self, rng: np.random.Generator) -> None:
        table = rng.lognormal(1.0, 1.0, (12, 1)) + rng.normal(0.0, 0.5, (12, 2))
        result = icc_2_1(table)
        for other in (table * 1000.0, table[:, ::-1], table[::-1]):
            assert icc_2_1(other).value == pytest.approx(result.value)
            assert icc_2_1(other).interval == pytest.approx(result.interval)
        assert result.interval.low < result.value < result.interval.high

    @pytest.mark.parametrize("table", [[[1.0, 2.0]], [[2.0, 2.0], [2.0, 2.0]]])
    def test_undefined(self, table: list[list[float]]) -> None:
        assert math.isnan(icc_2_1(table).value)


class TestCcc:
    def test_by_the_definition(self, rng: np.random.Generator) -> None:
        """1 - E[(X - Y)^2] / (the same if X and Y were independent)."""
        x = rng.normal(5.0, 2.0, 30)
        y = 0.8 * x + rng.normal(0.0, 1.0, 30)
        independent = np.mean((x[:, None] - y[None]) ** 2)
        expected = 1.0 - np.mean((x - y) ** 2) / independent
        assert ccc(x, y).value == pytest.approx(expected)

    def test_interval_matches_resampling(self, rng: np.random.Generator) -> None:
        x = rng.normal(5.0, 2.0, 300)
        y = 0.9 * x + 0.4 + rng.normal(0.0, 0.8, 300)
        result = ccc(x, y)
        draws = rng.integers(0, 300, (1500, 300))
        low, high = np.percentile([ccc(x[d], y[d]).value for d in draws], (2.5, 97.5))
        assert result.interval.low == pytest.approx(low, abs=0.006)
        assert result.interval.high == pytest.approx(high, abs=0.006)

    def test_perfect_and_undefined(self) -> None:
        assert ccc([1.0, 2.0], [1.0, 2.0]).interval == (1.0, 1.0)
        assert math.isnan(ccc([1.0, 1.0], [1.0, 1.0]).value)
        assert math.isnan(ccc([1.0], [1.0]).value)
        assert ccc([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).value == 0.0
        assert ccc([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]).value == -1.0


def test_agree_collects_everything(rng: np.random.Generator) -> None:
    x = rng.lognormal(1.0, 1.0, 20)
    y = x + rng.normal(0.0, 0.3, 20)
    result = agree(x, y)
    assert result.pearson_r2 == pytest.approx(stats.pearsonr(x, y).statistic ** 2)
    assert result.icc == icc_2_1(np.column_stack([x, y]))
    assert result.ccc == ccc(x, y)


@pytest.mark.parametrize(("x", "y"), [([1.0], [1.0, 2.0]), ([math.nan], [1.0])])
def test_impossible_input(x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needed|finite"):
        agree(x, y)
