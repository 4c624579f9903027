"""The page of a folder run: every scan and every failure, and which volumes stand apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.reported_scans import full_report, segmented_head
from tests.unit.report.test_html import Page
from wmh_lora.report.html import CohortFailure, CohortScan, cohort_html
from wmh_lora.report.html_cohort import robust_z


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return full_report(segmented_head())


def scans(report: dict[str, Any], volumes: list[float]) -> list[CohortScan]:
    return [
        CohortScan(f"sub-{n:02d}", {**report, "wmh_volume_ml": v}, f"sub-{n:02d}_wmh.html")
        for n, v in enumerate(volumes)
    ]


def test_shows_scans_failures_and_outliers(report: dict[str, Any]) -> None:
    done = scans(report, [1.0, 2.0, 3.0, 4.0, 5.0, 400.0])
    failed = [CohortFailure("sub-99", "sub-99_FLAIR.nii.gz: the file ends early.")]
    page = Page(cohort_html(done, failed, title="study-a"))
    assert page.faults == []
    assert page.open == []
    for words in ("study-a", "sub-99_FLAIR.nii.gz: the file ends early.", "1 failed.", "apart"):
        assert words in page.text
    assert "sub-05 : 400.00 mL, robust z +" in page.text.replace("sub-05:", "sub-05 :")
    links = [link for link in page.with_attribute("href") if not link.startswith("data:")]
    assert set(links) == {scan.page for scan in done}


def test_says_which_scans_have_which_verdict(report: dict[str, Any]) -> None:
    bare = {key: value for key, value in report.items() if key not in ("regions", "quality")}
    page = Page(cohort_html([*scans(report, [1.0, 2.0]), CohortScan("x", bare)]))
    assert "2 Read with care 1 Quality not assessed" in page.text
    assert "Not judged: it takes at least 5 scans" in page.text
    assert page.faults == []


def test_a_run_without_any_result() -> None:
    page = Page(cohort_html([], [CohortFailure("a", "It is empty.")]))
    assert page.faults == []
    assert "No scan was done." in page.text


def test_names_are_escaped_and_links_quoted(report: dict[str, Any]) -> None:
    name = 'sub/<b>"x" & y'
    page = Page(cohort_html([CohortScan(name, report, f"{name}_wmh.html")]))
    assert name in page.text
    links = [link for link in page.with_attribute("href") if not link.startswith("data:")]
    assert set(links) == {"sub/%3Cb%3E%22x%22%20%26%20y_wmh.html"}


def test_a_colon_in_a_name_makes_no_scheme(report: dict[str, Any]) -> None:
    page = Page(cohort_html([CohortScan("x", report, "javascript:alert(1)_wmh.html")]))
    links = [link for link in page.with_attribute("href") if not link.startswith("data:")]
    assert set(links) == {"javascript%3Aalert%281%29_wmh.html"}


class TestRobustZ:
    def test_follows_the_definition(self, rng: np.random.Generator) -> None:
        volumes = rng.lognormal(1.0, 1.0, 31)
        logs = np.log(volumes + 0.1)
        spread = np.median(np.abs(logs - np.median(logs)))
        expected = (logs - np.median(logs)) / (1.482602 * spread)
        found = np.array(robust_z(volumes.tolist()), dtype=np.float64)
        np.testing.assert_allclose(found, expected, rtol=1e-3)

    def test_is_not_moved_by_one_extreme(self) -> None:
        volumes = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        for extreme in (100.0, 1e6):
            scores = robust_z([*volumes, extreme])
            assert scores[-1] is not None
            assert scores[-1] > 3.5
            assert all(score is not None and abs(score) < 3.5 for score in scores[:-1])

    @pytest.mark.parametrize("volumes", [[], [1.0] * 4, [2.0] * 9])
    def test_judges_nothing_without_a_spread(self, volumes: list[float]) -> None:
        assert robust_z(volumes) == [None] * len(volumes)

    def test_takes_scans_without_lesions(self) -> None:
        scores = robust_z([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
        assert scores[0] is not None
        assert math.isfinite(scores[0])
