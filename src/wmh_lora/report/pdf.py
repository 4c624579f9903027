"""The report of one scan for print: figures and montage on one page, then the list of lesions.

Drawn with matplotlib, so that no browser is needed; its text can be searched and copied.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from wmh_lora._version import __version__
from wmh_lora.files import printable
from wmh_lora.report.extras import require
from wmh_lora.report.html_facts import (
    DEEP_HOLDS,
    Figure,
    key_figures,
    quality_of,
    setting_rows,
    splits_of,
    subtitle_of,
)
from wmh_lora.report.html_lesions import LesionRow, lesion_rows
from wmh_lora.report.segmented import Segmented

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Page

__all__ = ["require_matplotlib", "scan_pdf"]

_A4_IN = (8.27, 11.69)
_MARGIN = 0.07  # of the width of the page
_LONGEST = 95  # of a setting, in letters
_TITLE_LETTERS = 40  # of full size, so that the verdict has room beside them
_LONGEST_TITLE = 80
_LINE_LETTERS = 125
_ROWS, _BLOCKS = 52, 2  # lesions below each other, and beside each other
_INK, _SOFT, _LINE, _ACCENT = "#16202c", "#4d5a69", "#c9d0d8", "#0b5cad"
_VERDICT_INK = {"pass": "#12703f", "warn": "#8a5200", "fail": "#a3223a", "none": "#4d5a69"}
_VERDICT_SIGN = {"pass": "\u2713", "warn": "!", "fail": "\u2715", "none": "\u2013"}
_HEADS = ("#", "mL", "region", "dist. mm", "prob.", "centre mm")
_STOPS = (0.05, 0.17, 0.20, 0.56, 0.68, 1.0)  # right edges; of the region, its left one
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names of files may hold dollar signs
    "font.family": "DejaVu Sans",
    "pdf.fonttype": 3,
    "text.color": _INK,
}
_FOOT = (
    "Research software, not a medical device. An automatic segmentation has to be checked by a "
    "qualified reader."
)


def scan_pdf(
    segmentation: Segmented, report: Mapping[str, Any], *, analysed_on: date | None = None
) -> bytes:
    """Draw the report of one scan as a PDF document of A4 pages.

    Parameters
    ----------
    segmentation : Segmented
        On the scan's own grid.
    report : mapping
        From `Segmentation.report`; ``regions`` and ``quality`` may be missing.
    analysed_on : date, optional
        Shown as the date of analysis; today by default.

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_pdf import PdfPages

    analysed_on = analysed_on or date.today()
    lesions = lesion_rows(segmentation, report.get("regions"))
    title = _title(report)
    stream = io.BytesIO()
    # no time of day: equal input gives equal bytes
    metadata = {"Title": f"{title}: WMH report", "CreationDate": None}
    with matplotlib.rc_context(_STYLE), PdfPages(stream, metadata=metadata) as document:
        for page in (
            _front(segmentation, report, title, analysed_on),
            *_lists(report, lesions, title, analysed_on),
        ):
            document.savefig(page)
    return stream.getvalue()


def _title(report: Mapping[str, Any]) -> str:
    return _shortened(str(report["file"] or "Scan"), _LONGEST_TITLE)


def require_matplotlib() -> None:
    """Find out before the work that a PDF could not be drawn.

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    """
    require("matplotlib", extra="evaluate", purpose="A PDF", instead="choose --report html")


def _page(title: str, subtitle: str) -> Page:
    from matplotlib.figure import Figure as Page

    page = Page(figsize=_A4_IN)
    page.text(_MARGIN, 0.962, "WHITE MATTER HYPERINTENSITIES ON FLAIR", size=7, color=_SOFT)
    size = 14 * min(1.0, _TITLE_LETTERS / len(title))
    page.text(_MARGIN, 0.946, title, size=size, weight="bold")
    lines = textwrap.fill(subtitle, _LINE_LETTERS, break_on_hyphens=False)
    page.text(_MARGIN, 0.941, lines, size=6.8, color=_SOFT, va="top", linespacing=1.3)
    page.text(_MARGIN, 0.022, _FOOT, size=6.8, color=_SOFT)
    page.text(1 - _MARGIN, 0.022, f"wmh-lora {__version__}", size=6.8, color=_SOFT, ha="right")
    _rule(page, 0.917)
    return page


def _rule(page: Page, y: float) -> None:
    from matplotlib.lines import Line2D

    page.add_artist(Line2D((_MARGIN, 1 - _MARGIN), (y, y), color=_LINE, linewidth=0.8))


def _front(
    segmentation: Segmented, report: Mapping[str, Any], title: str, analysed_on: date
) -> Page:
    page = _page(title, subtitle_of(report, analysed_on))
    quality = quality_of(report)
    page.text(
        1 - _MARGIN,
        0.941,
        f"{_VERDICT_SIGN[quality.verdict]}  {quality.title}",
        size=9,
        weight="bold",
        color=_VERDICT_INK[quality.verdict],
        ha="right",
    )
    figures = key_figures(segmentation, report)
    step = (1 - 2 * _MARGIN) / len(figures)
    for number, figure in enumerate(figures):
        _figure(page, _MARGIN + number * step, figure)
    y = 0.802
    for split in splits_of(report):
        text = split.reason or (
            f"periventricular {split.periventricular_ml:.2f} mL, deep {split.deep_ml:.2f} mL"
        )
        page.text(_MARGIN, y, split.name, size=8, weight="bold")
        page.text(_MARGIN + 0.12, y, text, size=8)
        page.text(_MARGIN + 0.12, y - 0.012, split.rule, size=6.2, color=_SOFT)
        y -= 0.03
    page.text(_MARGIN + 0.12, y + 0.004, DEEP_HOLDS, size=6.2, color=_SOFT)
    y -= 0.008
    _montage(page, segmentation, y - 0.002)
    return page


def _figure(page: Page, x: float, figure: Figure) -> None:
    label = f"{figure.label} ({figure.tag})" if figure.tag else figure.label
    page.text(x, 0.897, label, size=7, weight="bold", color=_SOFT)
    if figure.value is None:
        page.text(x, 0.874, "not available", size=9, color=_SOFT)
    else:
        text = f"{figure.value} {figure.unit}".strip()
        page.text(x, 0.874, text, size=12 if len(text) < 9 else 9.5, weight="bold")
    note = textwrap.fill(figure.note, 30)
    page.text(x, 0.866, note, size=5.8, color=_SOFT, va="top", linespacing=1.3)


def _montage(page: Page, segmentation: Segmented, top: float) -> None:
    picture = np.asarray(segmentation.picture())
    height_px, width_px = picture.shape[:2]
    width, room = 1 - 2 * _MARGIN, top - 0.045
    height = width * _A4_IN[0] * height_px / width_px / _A4_IN[1]
    if height > room:
        width, height = width * room / height, room
    axes = page.add_axes((0.5 - width / 2, top - height, width, height))
    axes.imshow(picture, interpolation="none", aspect="auto")
    axes.set_axis_off()


def _lists(
    report: Mapping[str, Any], lesions: Sequence[LesionRow], title: str, analysed_on: date
) -> list[Page]:
    """Draw what was checked and set, and the lesions, on as many pages as they take."""
    page = _page(title, "Quality, settings and lesions")
    y = 0.9
    checks = quality_of(report).reasons
    sentences = [(check.verdict, check.sentence) for check in checks]
    sentences += [("warn", str(text)) for text in report["warnings"]]
    if not sentences:
        verdict = quality_of(report).verdict
        sentences = [(verdict, f"{quality_of(report).title}.")]
    for verdict, sentence in sentences:
        lines = textwrap.wrap(sentence, 120)
        page.text(_MARGIN, y, _VERDICT_SIGN[verdict], size=8, color=_VERDICT_INK[verdict])
        page.text(_MARGIN + 0.02, y, lines[0], size=7.5)
        for line in lines[1:]:
            y -= 0.012
            page.text(_MARGIN + 0.02, y, line, size=7.5)
        y -= 0.015
    y -= 0.004
    for name, value in setting_rows(report, analysed_on):
        page.text(_MARGIN, y, name, size=7, color=_SOFT)
        page.text(_MARGIN + 0.22, y, _shortened(value), size=7)
        y -= 0.0135
    pages, top = [page], y - 0.02
    rest = list(lesions)
    while rest:
        rows = min(_ROWS, int((top - 0.06) / 0.0145))
        shown, rest = rest[: rows * _BLOCKS], rest[rows * _BLOCKS :]
        for block in range(0, len(shown), rows):
            x = _MARGIN + block // rows * 0.5 * (1 - 2 * _MARGIN + 0.02)
            _rows(pages[-1], x, top, shown[block : block + rows])
        if rest:
            pages.append(_page(title, "Lesions, continued"))
            top = 0.9
    return pages


def _shortened(text: str, most: int = _LONGEST) -> str:
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"


def _rows(page: Page, x: float, top: float, rows: Sequence[LesionRow]) -> None:
    width = 0.5 * (1 - 2 * _MARGIN - 0.02)
    lines = [_HEADS, *(_cells(row) for row in rows)]
    for number, cells in enumerate(lines):
        for column, (cell, stop) in enumerate(zip(cells, _STOPS, strict=True)):
            page.text(
                x + stop * width,
                top - 0.0145 * number,
                cell,
                size=6.5,
                ha="left" if column == 2 else "right",
                weight="bold" if number == 0 else "normal",
                color=_SOFT if number == 0 else _INK,
            )


def _cells(row: LesionRow) -> tuple[str, ...]:
    return (
        str(row.index),
        f"{row.volume_ml:.3f}",
        row.region or "\u2013",
        "\u2013" if row.distance_mm is None else f"{row.distance_mm:.1f}",
        f"{row.mean_probability:.2f}",
        ", ".join(f"{mm:.0f}" for mm in row.centre_mm),
    )
