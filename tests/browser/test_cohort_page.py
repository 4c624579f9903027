"""The page of a folder run in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.reported_scans import full_report, segmented_head
from wmh_lora.report.html import CohortFailure, CohortScan, cohort_html

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [1280, 400])
def test_sorts_links_and_fits(browser: Browser, pictures: Path, tmp_path: Path, width: int) -> None:
    report = full_report(segmented_head())
    volumes = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 500.0]
    scans = [
        CohortScan(f"sub-{n}", {**report, "wmh_volume_ml": v}, f"sub-{n}_wmh.html")
        for n, v in enumerate(volumes)
    ]
    path = tmp_path / "wmh.html"
    failed = [CohortFailure("sub-9", "sub-9_FLAIR.nii.gz: the file ends early.")]
    path.write_text(cohort_html(scans, failed, title="study-a"), encoding="utf-8")
    (tmp_path / "sub-4_wmh.html").write_text("<title>sub-4</title>", encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(120_000)  # milliseconds: software rendering on a busy machine
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto(path.as_uri())
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    names = page.locator("tbody th")
    page.locator("button.sort", has_text="WMH mL").click()
    assert names.all_inner_texts() == [f"sub-{n}" for n in (1, 3, 5, 0, 2, 4, 6)]
    page.locator("button.sort", has_text="WMH mL").click()
    assert names.first.inner_text() == "sub-6"
    page.screenshot(path=pictures / f"cohort-{width}.png", full_page=True)
    page.locator("tbody a", has_text="sub-4").click()
    page.wait_for_url("**/sub-4_wmh.html")
    assert messages == []
    page.close()
