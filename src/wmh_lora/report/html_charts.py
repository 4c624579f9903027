"""The small drawings of the HTML reports, as inline SVG that follows the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape

__all__ = ["Dot", "size_histogram", "volume_strip"]

SIZE_LIMITS_ML = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Between the bars of the histogram: lesion volumes span four orders of magnitude."""

_BAR_PX, _GAP_PX, _PLOT_PX = 42, 6, 118
_TICKS_ML = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_STRIP_PX = (720, 220)
_STRIP_MARGIN_PX = 24
_DOT_PX = 5.0


def size_histogram(volumes_ml: Sequence[float]) -> Markup:
    """Draw how many lesions there are of each size, and how much they hold together.

    Parameters
    ----------
    volumes_ml : sequence of float
        Volume of each lesion in millilitres.

    Returns
    -------
    Markup
        An ``svg`` element that names its content to screen readers.
    """
    volumes = np.asarray(volumes_ml, dtype=np.float64)
    place = np.searchsorted(SIZE_LIMITS_ML, volumes, side="right")
    counts = np.bincount(place, minlength=len(SIZE_LIMITS_ML) + 1)
    sums = np.bincount(place, weights=volumes, minlength=len(SIZE_LIMITS_ML) + 1)
    names = _class_names()
    width = len(names) * (_BAR_PX + _GAP_PX)
    parts = []
    for n, (name, count, total) in enumerate(zip(names, counts.tolist(), sums.tolist())):
        x = n * (_BAR_PX + _GAP_PX) + _GAP_PX / 2
        height = 0.0 if count == 0 else max(2.0, _PLOT_PX * count / max(1, counts.max()))
        middle = x + _BAR_PX / 2
        parts.append(
            f"<g><title>{count} lesions of {escape(name)} mL, {total:.2f} mL together</title>"
            f'<rect class="bar" x="{x:g}" y="{16 + _PLOT_PX - height:.1f}" width="{_BAR_PX}" '
            f'height="{height:.1f}" rx="2"/>'
            f'<text class="value" x="{middle:g}" y="{11 + _PLOT_PX - height:.1f}">{count}</text>'
            f'<text class="faint" x="{middle:g}" y="{_PLOT_PX + 52}">'
            f"{escape(_short_ml(total))}</text></g>"
        )
    for n, limit in enumerate(SIZE_LIMITS_ML, start=1):
        x = n * (_BAR_PX + _GAP_PX)
        parts.append(f'<text x="{x:g}" y="{_PLOT_PX + 34}">{limit:g}</text>')
        parts.append(
            f'<line class="axis" x1="{x:g}" x2="{x:g}" y1="{_PLOT_PX + 16}" y2="{_PLOT_PX + 21}"/>'
        )
    base = 16 + _PLOT_PX
    summary = ", ".join(f"{c} of {n} mL" for n, c in zip(names, counts.tolist()) if c) or "none"
    return Markup(
        f'<svg class="chart histogram" viewBox="0 0 {width} {_PLOT_PX + 56}" role="img" '
        f'aria-label="Lesions by volume: {escape(summary)}">'
        f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>{"".join(parts)}</svg>'
    )


def _class_names() -> list[str]:
    inner = [f"{a:g}–{b:g}" for a, b in pairwise(SIZE_LIMITS_ML)]
    return [f"<{SIZE_LIMITS_ML[0]:g}", *inner, f"≥{SIZE_LIMITS_ML[-1]:g}"]


def _short_ml(total: float) -> str:
    return "" if total == 0 else f"{total:.1f}" if total >= 0.05 else "<0.1"


@dataclass(frozen=True)
class Dot:
    """One scan of a cohort: its name, its volume in mL, its page, and whether it stands apart."""

    name: str
    volume_ml: float
    link: str | None
    outlying: bool


def volume_strip(dots: Sequence[Dot], offset_ml: float) -> Markup:
    """Draw the volumes of a cohort along a logarithmic axis, a dot a scan.

    Parameters
    ----------
    dots : sequence of Dot
        At least one.
    offset_ml : float
        Added to every volume before the logarithm, so that a scan without lesions has a place.

    Returns
    -------
    Markup
        An ``svg`` element; dots link to the pages of their scans. Outlying ones are diamonds.
    """
    width, height = _STRIP_PX
    largest = max(dot.volume_ml for dot in dots)
    ticks = [0.0, *(t for t in _TICKS_ML if t <= largest)]
    first, last = math.log(offset_ml), math.log(max(largest, _TICKS_ML[0]) + offset_ml)

    def x_of(volume_ml: float) -> float:
        share = (math.log(volume_ml + offset_ml) - first) / (last - first)
        return _STRIP_MARGIN_PX + share * (width - 2 * _STRIP_MARGIN_PX)

    base = height - 30
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{base}" y2="{base}"/>']
    for tick in ticks:
        x = x_of(tick)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>'
            f'<text x="{x:.1f}" y="{base + 20}">{tick:g}</text>'
        )
    ends: list[float] = []  # where the last dot of each level is, the lowest level first
    for dot in sorted(dots, key=lambda dot: (dot.volume_ml, dot.name)):
        x = x_of(dot.volume_ml)
        level = next((i for i, end in enumerate(ends) if x - end >= 2 * _DOT_PX), len(ends))
        ends[level : level + 1] = [x]
        # more dots than fit above each other lie on one another at the top
        y = max(_DOT_PX + 1, base - 2 - (2 * level + 1) * _DOT_PX)
        parts.append(_dot(dot, x, y))
    middle = float(np.median([dot.volume_ml for dot in dots]))
    label = f"WMH volumes of {len(dots)} scans, median {middle:.2f} mL, largest {largest:.2f} mL"
    return Markup(
        f'<svg class="chart strip" viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _dot(dot: Dot, x: float, y: float) -> str:
    r = _DOT_PX
    shape = (
        f'<path class="dot outlying" d="M{x:.1f} {y - r - 1:.1f}l{r + 1:g} {r + 1:g}'
        f'l{-r - 1:g} {r + 1:g}l{-r - 1:g} {-r - 1:g}z"/>'
        if dot.outlying
        else f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{r - 0.5:g}"/>'
    )
    shape += f"<title>{escape(dot.name)}: {dot.volume_ml:.2f} mL</title>"
    if dot.link is None:
        return f"<g>{shape}</g>"
    return f'<a href="{escape(dot.link)}" tabindex="-1">{shape}</a>'
