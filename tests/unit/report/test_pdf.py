"""The report for print: pages for everything, the same every time."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from datetime import date

import matplotlib
import numpy as np
import pytest

from tests.reported_scans import full_report, segmented_head
from wmh_lora.errors import ConfigError
from wmh_lora.postprocess import describe_lesions
from wmh_lora.report.pdf import _STYLE, _VERDICT_SIGN, _front, _lists, _title, scan_pdf

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


@pytest.mark.parametrize(
    "name",
    [
        "sub-01_FLAIR.nii.gz",
        "ADNI_023_S_0030_MR_Axial_3D_PASL__Eyes_Open__br_raw_20170306111930741_72_S558210_I825829.nii",
        "M\udcfcller_$\\frac$_FLAIR.nii.gz",
    ],
)
def test_the_head_of_the_page_fits_beside_the_verdict(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    segmentation = segmented_head()
    report = {**full_report(segmentation), "file": name}
    used = {"planes": 3, "zoom": 1.2, "precision": "float32"}
    report["settings"] = {**report["settings"], "used": used}
    scan_pdf(segmentation, report, analysed_on=DAY)
    with matplotlib.rc_context(_STYLE):
        page = _front(segmentation, report, _title(report), DAY)
        FigureCanvasAgg(page).draw()
        lists = _lists(report, [], _title(report), DAY)[0]
        FigureCanvasAgg(lists).draw()
    width = page.bbox.width
    boxes = {text.get_text(): text.get_window_extent() for text in page.texts}
    verdict = boxes[next(text for text in boxes if text.startswith(tuple(_VERDICT_SIGN.values())))]
    title = boxes[_title(report)]
    assert title.x1 < verdict.x0
    assert max(box.x1 for box in boxes.values()) < 0.97 * width
    settings = [text.get_window_extent() for text in lists.texts]
    assert max(box.x1 for box in settings) < 0.97 * width
    assert not any(a.overlaps(b) for a, b in itertools.combinations(settings, 2))
