"""What a notebook shows for a result: picture and key figures, in a few tens of kilobytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from PIL import Image

from wmh_lora.quality import QualityReport
from wmh_lora.regions import Regions
from wmh_lora.report.html_page import data_uri

__all__ = ["card"]

_WIDTH_PX = 720
_JPEG_QUALITY = 80


def card(
    title: str,
    picture: Image.Image,
    *,
    regions: Regions,
    quality: QualityReport,
    threshold: float,
    warnings: Sequence[str] = (),
) -> str:
    """Write a result as a small piece of HTML.

    Parameters
    ----------
    title : str
        Scan, volume and number of lesions.
    picture : PIL.Image.Image
        The montage; shown smaller.
    regions : Regions
        Where the lesions are.
    quality : QualityReport
        Its verdict and concerns are listed.
    threshold : float
        From which probability a voxel counts as lesion.
    warnings : sequence of str
        Each in a line.

    Returns
    -------
    str
        HTML without scripts, style sheets or addresses.
    """
    facts = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in _facts(regions, quality, threshold)
    )
    told = "".join(f"<p>{escape(text)}</p>" for text in warnings)
    return (
        f"<div><p><strong>{escape(title)}</strong></p>"
        f'<img src="{_small(picture)}" alt="{escape(title)}" style="max-width:100%">'
        f"<table>{facts}</table>{told}</div>"
    )


def _facts(regions: Regions, quality: QualityReport, threshold: float) -> Iterator[tuple[str, str]]:
    if regions.lesions:
        first = regions.lesions[0]
        yield "Largest lesion", f"{first.volume_ml:.2f} mL, {first.diameter_mm:.0f} mm across"
    if regions.wmh_percent_of_icv is not None:
        share = f"{regions.wmh_percent_of_icv:.2f} % of {regions.icv_ml:.0f} mL"
        yield "Share of the intracranial volume", share
    if (split := regions.voxel_distance_10mm) is not None:
        yield "Within 10 mm of the ventricles", f"{split.periventricular_ml:.2f} mL"
        yield "Farther away", f"{split.deep_ml:.2f} mL"
    yield "Threshold", f"{threshold:g}"
    concerns = [check.sentence for check in quality.checks if check.verdict != "pass"]
    yield "Quality", ": ".join([quality.verdict, *([" ".join(concerns)] if concerns else [])])


def _small(picture: Image.Image) -> str:
    small: Any = picture.convert("RGB")
    small.thumbnail((_WIDTH_PX, _WIDTH_PX * 4), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return data_uri(stream.getvalue(), "image/jpeg")
