"""Figures of an evaluation, for print: legible in grey, to the colour-blind, at 8 points and more.

Colours are those of Okabe and Ito; wherever colour tells something apart, a marker, a line style, a
hatch or its brightness does so too. Text in SVG stays text. Equal input gives equal files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from wmh_lora.evaluation.agreement import BlandAltman, agree
from wmh_lora.evaluation.measures import Measure
from wmh_lora.files import open_atomic

__all__ = [
    "Series",
    "bland_altman",
    "boxes",
    "correlation",
    "save_figure",
    "style",
    "threshold_curve",
]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, YELLOW = "#0072B2", "#D55E00", "#CC79A7", "#F0E442"
GREY = "#666666"

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)
_MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")

_PRINT_DPI = 300
_PANEL_IN = 3.2
_PAGE_IN = 7.0
_LABEL_APART = 0.13  # of the height of a panel: two lines of text

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "text.parse_math": False,  # names may hold dollar signs
    "font.size": 8.0,
    "axes.labelsize": 9.0,
    "axes.titlesize": 9.0,
    "legend.fontsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "wmh-lora",
}


@dataclass(frozen=True)
class Series:
    """Volumes of one cohort or method: two rows of N, in mL."""

    name: str
    reference_ml: Sequence[float]
    prediction_ml: Sequence[float]


def style() -> AbstractContextManager[None]:
    """Apply the settings of every figure here, for the block of a ``with`` statement."""
    return matplotlib.rc_context(_STYLE)


def save_figure(figure: Figure, stem: Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write a figure as ``<stem>.png`` (300 dpi) and ``<stem>.svg``.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        From a function of this module.
    stem : Path
        In an existing folder, without extension.
    overwrite : bool
        Replace files that exist.

    Raises
    ------
    DataError
        A file exists, or cannot be written.
    """
    # No date and no version inside, so that equal figures are equal files.
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
    }
    paths = []
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format=kind, dpi=_PRINT_DPI, metadata=metadata[kind])
        path = stem.with_name(f"{stem.name}.{kind}")
        with open_atomic(path, overwrite=overwrite) as stream:
            stream.write(buffer.getvalue())
        paths.append(path)
    return paths[0], paths[1]


def bland_altman(series: Sequence[Series]) -> Figure:
    """Draw differences against means, with bias, limits of agreement and their intervals.

    Parameters
    ----------
    series : sequence of Series
        One panel each, on common axes.
    """
    with style():
        figure, axes = _panels(len(series), height_in=2.9)
        results = [agree(s.reference_ml, s.prediction_ml).bland_altman for s in series]
        for axis, entry, result in zip(axes, series, results, strict=True):
            reference, prediction = np.asarray(entry.reference_ml), np.asarray(entry.prediction_ml)
            axis.scatter((reference + prediction) / 2.0, prediction - reference, **_POINTS)
            axis.axhline(0.0, color=GREY, linewidth=0.8, zorder=1)
            for estimate, line in (
                (result.upper, (0, (4, 2))),
                (result.bias, "-"),
                (result.lower, (0, (4, 2))),
            ):
                if math.isnan(estimate.value):
                    continue
                axis.axhline(estimate.value, color=VERMILION, linestyle=line, linewidth=1.4)
            axis.set_xlabel("Mean of prediction and reference (mL)")
            axis.set_title(entry.name, loc="left")
        _share_limits(axes, [r for result in results for r in _ends(result)])
        for axis, result in zip(axes, results, strict=True):
            _label_lines(axis, result)
            _draw_intervals(axis, result)
        _label_first(axes, "Prediction \N{MINUS SIGN} reference (mL)")
        return figure


def correlation(series: Sequence[Series]) -> Figure:
    """Draw predicted against reference volumes, with the line of identity.

    Parameters
    ----------
    series : sequence of Series
        One panel each, on common axes.
    """
    with style():
        figure, axes = _panels(len(series), height_in=_PANEL_IN)
        largest = max([1e-3, *(v for s in series for v in (*s.reference_ml, *s.prediction_ml))])
        for axis, entry in zip(axes, series, strict=True):
            axis.plot([0, largest * 1.05], [0, largest * 1.05], color=GREY, **_IDENTITY)
            axis.scatter(entry.reference_ml, entry.prediction_ml, **_POINTS)
            result = agree(entry.reference_ml, entry.prediction_ml)
            text = "\n".join(
                f"{label} = {value:.3f}"
                for label, value in (
                    ("R²", result.pearson_r2),
                    ("ICC(2,1)", result.icc.value),
                    ("CCC", result.ccc.value),
                )
                if not math.isnan(value)
            )
            axis.text(0.04, 0.97, text, transform=axis.transAxes, va="top")
            axis.set(
                xlim=(0, largest * 1.05),
                ylim=(0, largest * 1.05),
                aspect="equal",
                xlabel="Reference volume (mL)",
            )
            axis.set_title(entry.name, loc="left")
            for ruler in (axis.xaxis, axis.yaxis):
                ruler.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes[0].legend(loc="lower right", handlelength=2.4)
        _label_first(axes, "Predicted volume (mL)")
        return figure


def boxes(
    measures: Sequence[Measure], groups: Sequence[tuple[str, Sequence[Sequence[float]]]]
) -> Figure:
    """Draw a box for each group, with all points beside it; one panel a measure.

    Boxes hold the middle half and the median; whiskers reach to the last point within 1.5 times the
    box. NaN is left out.

    Parameters
    ----------
    measures : sequence of Measure
        One panel each.
    groups : sequence of (name, values)
        Values by measure, in the order of `measures`.
    """
    with style():
        figure, axes = _panels(len(measures), height_in=2.5, width_in=2.3)
        for panel, (axis, entry) in enumerate(zip(axes, measures, strict=True)):
            for place, (_, values) in enumerate(groups):
                defined = np.asarray(values[panel], dtype=np.float64)
                defined = defined[np.isfinite(defined)]
                if len(defined):
                    _box(axis, place, defined)
            axis.set_xlim(-0.6, len(groups) - 0.4)
            names = [name for name, _ in groups]
            slanted = sum(len(name) for name in names) > 24
            axis.set_xticks(
                range(len(groups)),
                names,
                rotation=35 if slanted else 0,
                ha="right" if slanted else "center",
                rotation_mode="anchor",
            )
            axis.set_ylabel(entry.title)
            if entry.unit:
                axis.set_ylim(bottom=0.0)
            else:
                axis.set_ylim(min(0.0, axis.get_ylim()[0]), 1.02)
        return figure


def threshold_curve(
    thresholds: ArrayLike,
    mean: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    chosen: float,
    *,
    label: str = "Dice",
) -> Figure:
    """Draw a score against the threshold, with its interval and the chosen threshold.

    Parameters
    ----------
    thresholds, mean, low, high : arrays (N,)
        Ascending thresholds, the mean score at each, and its 95 % interval.
    chosen : float
        The threshold that was taken.
    label : str
        What the score is.
    """
    with style():
        figure, (axis, *_) = _panels(1, height_in=2.6)
        if np.isfinite(np.asarray(low)).any():  # one subject has no interval
            axis.fill_between(
                np.asarray(thresholds),
                np.asarray(low),
                np.asarray(high),
                color=SKY,
                alpha=0.35,
                linewidth=0,
                label="95 % interval",
            )
        axis.plot(
            thresholds, mean, color=BLUE, linewidth=1.6, marker="o", markersize=3, label="mean"
        )
        axis.axvline(
            chosen, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.0, label=f"chosen: {chosen:g}"
        )
        axis.set(xlabel="Threshold on the probability", ylabel=label)
        figure.legend(loc="outside lower center", ncols=3, handlelength=1.8, columnspacing=1.2)
        return figure


_POINTS: dict[str, Any] = {
    "s": 18,
    "facecolor": SKY,
    "edgecolor": BLACK,
    "linewidth": 0.6,
    "alpha": 0.9,
    "zorder": 3,
}
_IDENTITY: dict[str, Any] = {
    "linestyle": (0, (4, 2)),
    "linewidth": 1.2,
    "label": "identity",
    "zorder": 1,
}


def _panels(
    count: int, *, height_in: float, width_in: float = _PANEL_IN
) -> tuple[Figure, list[Axes]]:
    columns = min(count, int(_PAGE_IN // width_in))  # print does not shrink the letters
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width_in * columns, height_in * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _ends(result: BlandAltman) -> list[float]:
    ends = [*result.lower.interval, *result.upper.interval, *result.bias.interval]
    return [end for end in ends if not math.isnan(end)]


def _share_limits(axes: Sequence[Axes], ends: Sequence[float]) -> None:
    """Give all axes the same limits, which hold their points and these values."""
    right = 1.08 * max(axis.get_xlim()[1] for axis in axes)
    bottom = min([axis.get_ylim()[0] for axis in axes] + list(ends))
    top = max([axis.get_ylim()[1] for axis in axes] + list(ends))
    margin = 0.03 * (top - bottom)
    for axis in axes:
        axis.set(xlim=(0.0, right), ylim=(bottom - margin, top + margin))


def _label_first(axes: Sequence[Axes], label: str) -> None:
    for axis in axes:
        spec = axis.get_subplotspec()
        if spec is not None and spec.is_first_col():
            axis.set_ylabel(label)


def _label_lines(axis: Axes, result: BlandAltman) -> None:
    """Write each line's value beside its right end, apart from each other."""
    if math.isnan(result.bias.value):
        return
    bottom, top = axis.get_ylim()
    lines = [("bias", result.bias, 0)]
    if not math.isnan(result.sd):
        lines += [("+1.96 SD", result.upper, 1), ("\N{MINUS SIGN}1.96 SD", result.lower, -1)]
    for name, estimate, side in lines:
        place = (estimate.value - result.bias.value) / (top - bottom)
        place = max(abs(place), _LABEL_APART) * side + (result.bias.value - bottom) / (top - bottom)
        axis.annotate(
            f"{name}\n{_signed(estimate.value)}",
            (1.01, place),
            xycoords="axes fraction",
            va="center",
        )


def _signed(value: float) -> str:
    text = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
    return "0.00" if text.endswith("0.00") and len(text) == 5 else text


def _draw_intervals(axis: Axes, result: BlandAltman) -> None:
    """Draw each line's interval as a bar near its right end; bars overlap less than bands do."""
    right = axis.get_xlim()[1]
    for estimate, place in ((result.lower, 0.97), (result.bias, 0.94), (result.upper, 0.97)):
        if not math.isnan(estimate.interval.low):
            axis.errorbar(
                [place * right],
                [estimate.value],
                yerr=[
                    [estimate.value - estimate.interval.low],
                    [estimate.interval.high - estimate.value],
                ],
                color=VERMILION,
                elinewidth=1.2,
                capsize=3,
                zorder=2,
            )


def _box(axis: Axes, place: int, values: NDArray[np.float64]) -> None:
    colour = _COLOURS[place % len(_COLOURS)]
    axis.boxplot(
        [values],
        positions=[place],
        widths=0.5,
        showfliers=False,
        patch_artist=True,
        medianprops={"color": BLACK, "linewidth": 1.6},
        boxprops={
            "facecolor": matplotlib.colors.to_rgba(colour, 0.35),
            "edgecolor": BLACK,
            "hatch": _HATCHES[place % len(_HATCHES)],
            "linewidth": 0.8,
        },
        whiskerprops={"linewidth": 0.8},
        capprops={"linewidth": 0.8},
        manage_ticks=False,
    )
    # Spread by rank, so that the same values always lie in the same places.
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    spread = ((ranks * 0.618034) % 1.0 - 0.5) * 0.36
    axis.scatter(
        place + spread,
        values,
        s=10,
        marker=_MARKERS[place % len(_MARKERS)],
        facecolor=colour,
        edgecolor=BLACK,
        linewidth=0.4,
        zorder=3,
        clip_on=False,
    )
