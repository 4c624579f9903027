"""The page of one scan, which opens anywhere without a network."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from wmh_lora.report.html_charts import size_histogram
from wmh_lora.report.html_cohort import CohortFailure, CohortScan, cohort_html
from wmh_lora.report.html_facts import (
    DEEP_HOLDS,
    key_figures,
    quality_of,
    setting_rows,
    splits_of,
    subtitle_of,
)
from wmh_lora.report.html_lesions import lesion_rows
from wmh_lora.report.html_page import data_uri, render_page
from wmh_lora.report.montage import png_bytes
from wmh_lora.report.segmented import Segmented
from wmh_lora.report.viewer import viewer_program, viewer_scene

__all__ = ["CohortFailure", "CohortScan", "cohort_html", "scan_html"]

# By layer: its name, its colours, and whether and how strongly it is shown at first.
_OVERLAYS = {
    "mask": ("Lesions", "orange", True, 0.55),
    "probability": ("Probability", "viridis", False, 0.7),
    "uncertainty": ("Uncertainty", "magma", False, 0.7),
    "ventricles": ("Ventricles", "blue", False, 0.45),
}


def scan_html(
    segmentation: Segmented,
    report: Mapping[str, Any],
    *,
    picture_png: bytes | None = None,
    analysed_on: date | None = None,
) -> str:
    """Write the page of one scan.

    Parameters
    ----------
    segmentation : Segmented
        On the scan's own grid.
    report : mapping
        From `Segmentation.report`; the page says so where ``regions`` or ``quality`` are missing.
    picture_png : bytes, optional
        The montage, if it has been drawn already.
    analysed_on : date, optional
        Shown as the date of analysis; today by default.

    Returns
    -------
    str
        HTML that holds its picture, its volumes and the viewer, and fetches nothing. It names the
        scan's file and no other detail of the patient.
    """
    analysed_on = analysed_on or date.today()
    regions = report.get("regions")
    lesions = lesion_rows(segmentation, regions)
    program, scene = viewer_program(), viewer_scene(segmentation)
    if picture_png is None:
        picture_png = png_bytes(segmentation.picture())
    return render_page(
        "scan.html",
        scripts=("table.js", "scan.js"),
        trusted=(program.source_hash,),
        title=report["file"] or "Scan",
        report=report,
        subtitle=subtitle_of(report, analysed_on),
        figures=key_figures(segmentation, report),
        splits=splits_of(report),
        quality=quality_of(report),
        deep_holds=DEEP_HOLDS,
        fazekas_rule=((regions or {}).get("fazekas") or {}).get("rule"),
        lesions=lesions,
        located=any(lesion.region is not None for lesion in lesions),
        histogram=size_histogram([lesion.volume_ml for lesion in lesions]),
        settings=setting_rows(report, analysed_on),
        picture=data_uri(picture_png, "image/png"),
        program=program,
        scene=scene,
        layers=[{"name": x.name, "low": x.low, "high": x.high} for x in scene.layers],
        overlays=[
            dict(zip(("label", "colours", "shown", "opacity"), _OVERLAYS[layer.name]), layer=layer)
            for layer in scene.layers[1:]
        ],
    )
