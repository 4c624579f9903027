"""The page of a scan: complete, escaped, closed to networks, and without holes."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reported_scans import full_report, segmented_head
from wmh_lora.report.html import scan_html
from wmh_lora.report.outputs import Segmentation
from wmh_lora.volume import Volume

DAY = date(2026, 3, 1)
VOID = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """Elements in order, whether they nest, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.faults: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def with_attribute(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.elements if name in attrs]


def page_of(segmentation: Segmentation, report: dict[str, Any] | None = None) -> Page:
    chosen = full_report(segmentation) if report is None else report
    return Page(scan_html(segmentation, chosen, analysed_on=DAY))


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Segmentation:
    return segmented_head(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="module")
def html(segmentation: Segmentation) -> str:
    return scan_html(segmentation, full_report(segmentation), analysed_on=DAY)


def test_elements_nest_and_names_are_unique(html: str) -> None:
    page = Page(html)
    assert page.faults == []
    assert page.open == []
    ids = page.with_attribute("id")
    assert len(ids) == len(set(ids))
    referred = {
        name
        for key in ("for", "aria-labelledby", "aria-describedby")
        for name in page.with_attribute(key)
    }
    assert referred <= set(ids)


def test_nothing_is_fetched(html: str) -> None:
    page = Page(html)
    targets = page.with_attribute("src") + page.with_attribute("href")
    assert targets
    assert all(target.startswith("data:") for target in targets)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    own = html[html.rindex("<script>") :]
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest", own)
    policy = page.with_attribute("content")[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_shows_the_figures(html: str) -> None:
    text = Page(html).text
    assert "sub-01_FLAIR.nii.gz" in text
    assert "Analysed 2026-03-01 · wmh-lora" in text
    assert "model phantom-v1 (abababababab) · threshold 0.6" in text
    for words in (
        "WMH volume 4.48 mL",
        "Lesions 2 From 3 voxels (480 mm³) up; the largest has 3.84 mL.",
        "estimate",
        "Contact rule",
        "10 mm rule",
        "Read with care",
        "Noise is high.",
        "1 check passed",
        "1 check could not be made",
        "Research software, not a medical device.",
        "4 views (flips)",
    ):
        assert words in text


def test_says_that_further_views_were_adaptive(segmentation: Segmentation) -> None:
    used = {"planes": 3, "zoom": 1.2, "precision": "bfloat16"}
    settings = {**segmentation.settings, "adaptive": True, "used": used}
    text = page_of(replace(segmentation, settings=settings)).text
    views = "4 views (flips), in three planes, evidence once more 1.2 times larger, adaptive"
    assert views in text
    assert "Precision bfloat16" in text


def test_lists_every_lesion_with_a_place_inside_it(segmentation: Segmentation, html: str) -> None:
    inverse = np.linalg.inv(segmentation.volume.affine)
    places = [
        [float(mm) for mm in text.split()] for text in Page(html).with_attribute("data-focus")
    ]
    assert len(places) == len(segmentation.lesions)
    for place in places:
        voxel = np.rint(inverse[:3, :3] @ place + inverse[:3, 3]).astype(int)
        assert segmentation.mask[tuple(voxel)] == 1


@pytest.mark.parametrize("missing", ["absent", "none"])
def test_says_why_something_is_missing(segmentation: Segmentation, missing: str) -> None:
    bare = replace(
        segmentation,
        structure_masks={},
        uncertainty=None,
        settings={**segmentation.settings, "tta": "none"},
    )
    report = {**bare.report(), "regions": None, "quality": None}
    if missing == "absent":
        del report["regions"], report["quality"]
    page = page_of(bare, report)
    assert page.faults == []
    assert "This report was made without the analysis of regions." in page.text
    assert "Quality not assessed" in page.text
    assert "It takes several looks; this scan was seen once (--tta none, --zoom 1)." in page.text
    assert "show-uncertainty" not in page.with_attribute("id")
    assert "Dist. mm" not in page.text
    assert "None" not in page.text.replace("None failed", "")
    assert "nan" not in page.text.lower().split()


def test_says_when_memory_left_no_room_for_a_closer_look(segmentation: Segmentation) -> None:
    settings = {**segmentation.settings, "tta": "none", "zoom": 1.2}
    once = replace(segmentation, uncertainty=None, settings=settings)
    assert "this scan was seen once, for want of memory." in page_of(once, once.report()).text


def test_repeats_the_reasons_of_the_regions(segmentation: Segmentation) -> None:
    bare = replace(segmentation, structure_masks={})
    text = page_of(bare).text
    assert "Not known: the model does not mark the ventricles." in text
    assert "Not known: the model does not mark the brain." in text


def test_a_scan_without_lesions(segmentation: Segmentation) -> None:
    none = replace(segmentation, mask=np.zeros_like(segmentation.mask), lesions=(), volume_ml=0.0)
    page = page_of(none)
    assert page.faults == []
    assert "No lesion was found." in page.text
    assert "No lesion of at least 3 voxels reached the threshold of 0.6." in page.text


def test_text_is_escaped(tmp_path: Path) -> None:
    hostile = "a<script>alert(1)<_b&c' onload='x_FLAIR.nii.gz"
    segmentation = segmented_head(tmp_path, name=hostile)
    report = full_report(segmentation)
    report["warnings"] = ["</script><img src=x onerror=alert(2)>"]
    report["quality"]["checks"][1]["sentence"] = "<b>bold</b>"
    report["regions"]["unavailable"]["icv_ml"] = "<i>"
    page = page_of(segmentation, report)
    assert page.faults == []
    assert hostile in page.text
    assert "<b>bold</b>" in page.text
    assert "onerror" not in {name for _, attrs in page.elements for name in attrs}
    assert "onload" not in {name for _, attrs in page.elements for name in attrs}
    assert not {"b", "i"} & {tag for tag, attrs in page.elements if not attrs}


def test_names_no_folder(tmp_path: Path) -> None:
    segmentation = segmented_head(tmp_path)
    segmentation = replace(segmentation, warnings=(f"{segmentation.volume.path}: odd.",))
    html = scan_html(segmentation, full_report(segmentation), analysed_on=DAY)
    assert "sub-01_FLAIR.nii.gz: odd." in html
    assert str(tmp_path) not in html


def test_equal_input_gives_equal_pages(segmentation: Segmentation, html: str) -> None:
    assert scan_html(segmentation, full_report(segmentation), analysed_on=DAY) == html


def test_takes_a_picture_that_was_drawn_already(segmentation: Segmentation) -> None:
    html = scan_html(segmentation, full_report(segmentation), picture_png=b"PNG")
    assert 'src="data:image/png;base64,UE5H"' in html


def test_a_clinical_scan_stays_below_six_megabytes(rng: np.random.Generator) -> None:
    """Noise everywhere inside the head is the worst that packing can meet."""
    shape = (256, 256, 40)
    x, y, z = np.ogrid[-1.15:1.15:256j, -1.15:1.15:256j, -1.15:1.15:40j]
    inside = x**2 + y**2 + z**2 < 1.0
    data = np.where(inside, rng.normal(500.0, 60.0, shape), rng.normal(20.0, 5.0, shape))
    mask = np.zeros(shape, np.uint8)
    mask[100:110, 100:110, 20] = 1
    volume = Volume(data.astype(np.float32), np.diag([0.9, 0.9, 4.0, 1.0]))
    probability = (0.9 * mask).astype(np.float32)
    segmentation = replace(
        segmented_head(),
        volume=volume,
        mask=mask,
        probability=probability,
        uncertainty=probability * 0.1,
        structure_masks={},
    )
    picture = rng.bytes(1_500_000)
    page = scan_html(segmentation, full_report(segmented_head()), picture_png=picture)
    assert len(page) < 6_000_000
