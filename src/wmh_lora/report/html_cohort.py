"""The page of a folder run: volumes, what stands apart, what failed, and the way to each scan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import quote

import numpy as np

from wmh_lora.report.html_charts import Dot, volume_strip
from wmh_lora.report.html_facts import VERDICTS, Figure, Quality, quality_of
from wmh_lora.report.html_page import render_page

__all__ = ["CohortFailure", "CohortScan", "cohort_html", "robust_z"]

OUTLIER_Z = 3.5
"""Robust z beyond which a volume is pointed out (Iglewicz and Hoaglin 1993)."""
OFFSET_ML = 0.1
"""Added before the logarithm, so that scans without lesions have one."""
_SMALLEST_COHORT = 5


@dataclass(frozen=True)
class CohortScan:
    """A scan that was segmented: its name, its report, and its page, relative to this one."""

    name: str
    report: Mapping[str, Any]
    page: str | None = None


@dataclass(frozen=True)
class CohortFailure:
    """An input that could not be done, and why; the message should name no folder."""

    name: str
    message: str


@dataclass(frozen=True)
class _Row:
    scan: CohortScan
    link: str | None
    quality: Quality
    z: float | None
    regions: Mapping[str, Any]

    @property
    def outlying(self) -> bool:
        return self.z is not None and abs(self.z) > OUTLIER_Z


def cohort_html(
    scans: Sequence[CohortScan],
    failures: Sequence[CohortFailure] = (),
    *,
    title: str = "Cohort",
    analysed_on: date | None = None,
) -> str:
    """Write the page of a run over many scans.

    Parameters
    ----------
    scans : sequence of CohortScan
        What was done, in the order of the table.
    failures : sequence of CohortFailure
        What was not.
    title : str
        Heading.
    analysed_on : date, optional
        Shown as the date of analysis; today by default.

    Returns
    -------
    str
        HTML that fetches nothing; it links to the pages of the scans beside it.
    """
    scores = robust_z([scan.report["wmh_volume_ml"] for scan in scans])
    rows = [
        _Row(
            scan,
            None if scan.page is None else quote(scan.page, errors="surrogateescape"),
            quality_of(scan.report),
            z,
            scan.report.get("regions") or {},
        )
        for scan, z in zip(scans, scores, strict=True)
    ]
    dots = [Dot(r.scan.name, r.scan.report["wmh_volume_ml"], r.link, r.outlying) for r in rows]
    verdicts = Counter(row.quality.verdict for row in rows)
    return render_page(
        "cohort.html",
        scripts=("table.js",),
        title=title,
        analysed_on=(analysed_on or date.today()).isoformat(),
        figures=_figures(rows, len(failures)),
        strip=volume_strip(dots, OFFSET_ML) if dots else None,
        rows=rows,
        outlying=sorted((r for r in rows if r.outlying), key=lambda r: -abs(r.z or 0.0)),
        scored=any(z is not None for z in scores),
        failures=failures,
        verdicts=[(key, label, verdicts[key]) for key, label in VERDICTS.items() if verdicts[key]],
        models=sorted({str(row.scan.report["model"]["name"]) for row in rows}),
        limit=OUTLIER_Z,
        offset=OFFSET_ML,
        smallest=_SMALLEST_COHORT,
    )


def robust_z(volumes_ml: Sequence[float]) -> list[float | None]:
    """Say how far each volume is from the others, on a logarithmic scale.

    The score is 0.6745 (x - median) / MAD of x = log(volume + 0.1 mL), the modified z of Iglewicz
    and Hoaglin (How to Detect and Handle Outliers, 1993), which a few extreme scans do not distort.

    Parameters
    ----------
    volumes_ml : sequence of float
        In millilitres.

    Returns
    -------
    list of float or None
        None for all where there are fewer than five scans, or where most volumes are equal.

    Examples
    --------
    >>> [round(z, 1) for z in robust_z([1, 2, 3, 4, 5, 300])]
    [-1.8, -0.8, -0.2, 0.2, 0.5, 6.7]
    """
    logs = np.log(np.asarray(volumes_ml, dtype=np.float64) + OFFSET_ML)
    if len(logs) < _SMALLEST_COHORT:
        return [None] * len(logs)
    from_median = logs - np.median(logs)
    spread = float(np.median(np.abs(from_median)))
    if spread < 1e-9:
        return [None] * len(logs)
    return [float(value) for value in 0.6745 * from_median / spread]


def _figures(rows: Sequence[_Row], failed: int) -> tuple[Figure, ...]:
    note = f"{failed} failed." if failed else "None failed."
    count = Figure("Scans", str(len(rows)), "done", note)
    if not rows:
        return (count,)
    volumes = [row.scan.report["wmh_volume_ml"] for row in rows]
    low, middle, high = np.percentile(volumes, [25, 50, 75])
    lesions = [row.scan.report["lesion_count"] for row in rows]
    empty = sum(n == 0 for n in lesions)
    return (
        count,
        Figure(
            "Median WMH volume", f"{middle:.2f}", "mL", f"Middle half {low:.2f} to {high:.2f} mL."
        ),
        Figure(
            "Range of volumes",
            f"{min(volumes):.2f}–{max(volumes):.2f}",
            "mL",
            f"{empty} without lesions." if empty else "Every scan has lesions.",
        ),
        Figure("Median lesion count", f"{np.median(lesions):g}", "", f"Largest {max(lesions)}."),
    )
