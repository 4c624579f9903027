"""The report for print: pages for everything, the same every time."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date

import numpy as np
import pytest

from tests.reported_scans import full_report, segmented_head
from wmh_lora.errors import ConfigError
from wmh_lora.postprocess import describe_lesions
from wmh_lora.report.pdf import scan_pdf

DAY = date(2026, 3, 1)


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmh_lora.report.montage.TILE_PX", 60)


def pages(document: bytes) -> int:
    return len(re.findall(rb"/Type /Page\b(?!s)", document))


def test_two_pages_that_are_equal_for_equal_input() -> None:
    segmentation = segmented_head()
    report = full_report(segmentation)
    document = scan_pdf(segmentation, report, analysed_on=DAY)
    assert document.startswith(b"%PDF")
    assert pages(document) == 2
    assert scan_pdf(segmentation, report, analysed_on=DAY) == document


def test_many_lesions_take_more_pages() -> None:
    segmentation = segmented_head()
    mask = np.zeros_like(segmentation.mask)
    mask[2:-2:4, 2:-2:4, 2] = 1
    lesions = tuple(describe_lesions(mask, segmentation.volume.affine))
    many = replace(segmentation, mask=mask, lesions=lesions, structure_masks={}, uncertainty=None)
    assert len(lesions) > 100
    assert pages(scan_pdf(many, many.report())) == 3


def test_copes_with_everything_missing() -> None:
    segmentation = segmented_head()
    bare = replace(
        segmentation,
        mask=np.zeros_like(segmentation.mask),
        lesions=(),
        volume_ml=0.0,
        structure_masks={},
        uncertainty=None,
    )
    report = bare.report()
    del report["regions"], report["quality"]
    assert pages(scan_pdf(bare, report)) == 2


def test_asks_for_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmh_lora.report.extras.find_spec", lambda name: None)
    segmentation = segmented_head()
    with pytest.raises(ConfigError, match="pip install"):
        scan_pdf(segmentation, segmentation.report())
