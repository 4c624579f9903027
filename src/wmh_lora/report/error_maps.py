"""The figure of single scans: FLAIR, reference, prediction, and where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray

from wmh_lora.errors import GridMismatchError
from wmh_lora.report.figures import BLACK, ORANGE, SKY, VERMILION, YELLOW, style
from wmh_lora.report.montage import edge_letters
from wmh_lora.view import choose_view
from wmh_lora.volume import Volume

__all__ = ["Example", "example_slice", "predictions_grid"]

WIDTH_IN = 7.0
HEADS = ("FLAIR", "Reference", "Prediction", "Errors")

# Three steps of brightness, over a dimmed scan: they differ without colour as well.
_FOUND, _MISSED, _FALSE = YELLOW, SKY, VERMILION
_DIMMED = 2.0
_BEHIND_TEXT = {"facecolor": BLACK, "alpha": 0.6, "linewidth": 0, "pad": 1.5}


@dataclass(frozen=True)
class Example:
    """One slice of a scan as it is shown, rows from top to bottom.

    Attributes
    ----------
    title : str
        Name and score.
    image : float array (H, W)
        FLAIR intensities.
    reference, prediction : bool arrays (H, W)
        The two masks.
    pixel_mm : two floats
        Height and width of a pixel.
    window : two floats
        Intensities shown as black and as white.
    letters : two strings
        Directions of the left and the right edge, such as R and L.
    """

    title: str
    image: NDArray[np.float32]
    reference: NDArray[np.bool_]
    prediction: NDArray[np.bool_]
    pixel_mm: tuple[float, float]
    window: tuple[float, float]
    letters: tuple[str, str]


def example_slice(
    title: str,
    image: Volume,
    reference: NDArray[Any],
    prediction: NDArray[Any],
    *,
    most: Literal["lesion", "errors"] = "lesion",
) -> Example:
    """Cut one slice out of a scan, by default that with most lesion in either mask.

    Parameters
    ----------
    title : str
        Written on it.
    image : Volume
        The FLAIR.
    reference, prediction : bool arrays (I, J, K)
        On the grid of the FLAIR.
    most : str
        What the slice shall hold most of; "errors" lie in one mask alone.

    Raises
    ------
    GridMismatchError
        If a mask does not have the shape of the scan.
    """
    for mask in (reference, prediction):
        if mask.shape != image.shape:
            raise GridMismatchError(
                f"The mask of {title} has shape {mask.shape}, its image {image.path} has "
                f"{image.shape}; give the image that was segmented."
            )
    view = choose_view(image, 1.0)
    scan = view.to_view(image.finite_data())
    masks = [view.to_view(mask) for mask in (reference, prediction)]
    shown = masks[0] ^ masks[1] if most == "errors" else masks[0] | masks[1]
    area = shown.sum(axis=(1, 2))
    index = int(area.argmax()) if area.any() else len(scan) // 2
    low, high = (float(level) for level in np.percentile(scan[index], (1.0, 99.8)))
    head = scan[index] > low + 0.1 * (high - low)
    rows, columns = _extent(head.sum(axis=1)), _extent(head.sum(axis=0))
    return Example(
        title=title,
        image=scan[index, rows, columns],
        reference=masks[0][index, rows, columns],
        prediction=masks[1][index, rows, columns],
        pixel_mm=(view.spacing_mm[1], view.spacing_mm[2]),
        window=(low, max(high, low + 1e-6)),
        letters=edge_letters(view, image),
    )


def predictions_grid(examples: Sequence[Example]) -> Figure:
    """Draw FLAIR, reference, prediction and error map of some scans, one row each.

    Parameters
    ----------
    examples : sequence of Example
        At least one.
    """
    ratios = [
        e.image.shape[0] * e.pixel_mm[0] / (e.image.shape[1] * e.pixel_mm[1]) for e in examples
    ]
    with style():
        tile_in = WIDTH_IN / len(HEADS)
        figure = Figure(
            figsize=(WIDTH_IN, tile_in * sum(ratios) + 0.2 * len(ratios) + 0.5),
            layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0),
        )
        grid = figure.subplots(
            len(examples), len(HEADS), squeeze=False, gridspec_kw={"height_ratios": ratios}
        )
        for axes, example in zip(grid, examples, strict=True):
            for column, axis in enumerate(axes):
                _tile(axis, example, column)
            axes[0].set_title(example.title, loc="left", fontsize=8.0)
            for letter, x, side in zip(example.letters, (0.02, 0.98), ("left", "right")):
                axes[0].annotate(
                    letter,
                    (x, 0.5),
                    xycoords="axes fraction",
                    ha=side,
                    va="center",
                    color="white",
                    bbox=_BEHIND_TEXT,
                )
        for axis, head in zip(grid[0], HEADS, strict=True):
            axis.annotate(
                head,
                (0.03, 0.97),
                xycoords="axes fraction",
                va="top",
                color="white",
                bbox=_BEHIND_TEXT,
            )
        _legend(figure)
        return figure


def _extent(profile: NDArray[Any]) -> slice:
    """Range that holds the head, with two pixels around it; specks of noise do not count."""
    present = np.flatnonzero(profile > 0.02 * profile.max())
    if len(present) == 0:
        return slice(0, len(profile))
    return slice(max(0, int(present[0]) - 2), int(present[-1]) + 3)


def _tile(axis: Axes, example: Example, column: int) -> None:
    aspect = example.pixel_mm[0] / example.pixel_mm[1]
    low, high = example.window
    if column > 0:
        high = low + _DIMMED * (high - low)
    axis.imshow(example.image, cmap="gray", vmin=low, vmax=high, aspect=aspect)
    axis.set_axis_off()
    reference, prediction = example.reference, example.prediction
    layers: tuple[list[tuple[NDArray[np.bool_], str]], ...] = (
        [],
        [(reference, SKY)],
        [(prediction, ORANGE)],
        [
            (reference & prediction, _FOUND),
            (prediction & ~reference, _FALSE),
            (reference & ~prediction, _MISSED),
        ],
    )
    for mask, colour in layers[column]:
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask] = to_rgba(colour)
        axis.imshow(overlay, aspect=aspect, interpolation="nearest")


def _legend(figure: Figure) -> None:
    names = {
        "found by both (bright)": _FOUND,
        "missed (middle)": _MISSED,
        "false (dark)": _FALSE,
    }
    handles = [
        Patch(facecolor=colour, edgecolor=BLACK, linewidth=0.5, label=name)
        for name, colour in names.items()
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles))
