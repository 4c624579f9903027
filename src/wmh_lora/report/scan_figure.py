"""Slices of a scan as a matplotlib figure, to be shown in a notebook or edited for print.

`wmh_lora.report.montage` draws the picture that is saved; this draws the same slices with axes,
lines and text that can be changed. Importing it takes matplotlib.
"""

from __future__ import annotations

import io
import math
from functools import reduce
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from wmh_lora.errors import ConfigError, GridMismatchError
from wmh_lora.files import printable
from wmh_lora.report.figures import ORANGE, SKY
from wmh_lora.report.montage import choose_slices, frame_head, lesions_of
from wmh_lora.view import choose_view
from wmh_lora.volume import Volume

__all__ = ["ScanFigure", "outline", "scan_figure"]

_TILE_IN = 1.9
_TITLE_IN = 0.35
_INLINE_DPI = 110


class ScanFigure(Figure):
    """A figure that a notebook shows by itself, without pyplot and whatever its backend."""

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.savefig(stream, format="png", dpi=_INLINE_DPI)
        return stream.getvalue()


def scan_figure(
    volume: Volume,
    mask: NDArray[Any],
    *,
    title: str,
    reference: NDArray[Any] | None = None,
    max_slices: int = 12,
    columns: int = 4,
) -> ScanFigure:
    """Draw slices across the head with outlines along the edges of the voxels.

    Slices are shown as radiologists do (the patient's right on the left, anterior up) in their true
    proportions, and named by their index in the array.

    Parameters
    ----------
    volume : Volume
        The scan.
    mask : array (I, J, K)
        Non-zero is outlined in orange.
    title : str
        Above the slices.
    reference : array (I, J, K), optional
        Its lesions are outlined in blue below the orange.
    max_slices, columns : int
        How many slices at most, and how many a row.

    Raises
    ------
    GridMismatchError
        If a mask does not have the shape of the scan.
    ConfigError
        If a number is below 1.
    """
    if min(max_slices, columns) < 1:
        raise ConfigError(
            f"A figure needs at least one slice and one column, not {max_slices} and {columns}."
        )
    view = choose_view(volume, 1.0)
    layers = []
    marked = None if reference is None else lesions_of(reference)
    for array, colour, name in ((marked, SKY, "reference"), (mask, ORANGE, "found")):
        if array is None:
            continue
        if array.shape != volume.shape:
            raise GridMismatchError(
                f"The mask has shape {array.shape}, the scan {volume.shape}; a figure needs both "
                "on one grid."
            )
        layers.append((view.to_view(array) != 0, colour, name))
    scan = view.to_view(volume.finite_data())
    drawn = reduce(np.logical_or, (layer for layer, _, _ in layers))
    frame = frame_head(scan, drawn)
    indices = choose_slices(frame.tissue, drawn, max_slices)
    aspect = view.spacing_mm[1] / view.spacing_mm[2]
    figure, axes = _grid(len(indices), columns, scan[0, frame.rows, frame.columns].shape, aspect)
    letter = "ijk"[view.axes[0]]
    for axis, index in zip(axes, indices, strict=True):
        low, high = frame.window
        plane = scan[index, frame.rows, frame.columns]
        axis.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=aspect)
        for layer, colour, _ in layers:
            segments = outline(layer[index, frame.rows, frame.columns])
            axis.add_collection(LineCollection(list(segments), colors=colour, linewidths=0.9))
        native = len(scan) - 1 - index if view.flips[0] else index
        axis.set_title(f"{letter} = {native}", fontsize=8.0, pad=2.0)
    sagittal = io_orientation(volume.affine)[view.axes[0], 0] == 0
    left, right = ("A", "P") if sagittal else ("R", "L")
    sides: dict[str, Any] = {"transform": axes[0].transAxes, "color": "white", "fontsize": 8.0}
    axes[0].text(0.02, 0.5, left, ha="left", va="center", **sides)
    axes[0].text(0.98, 0.5, right, ha="right", va="center", **sides)
    figure.suptitle(printable(title), fontsize=9.0, parse_math=False)
    if reference is not None:
        handles = [Line2D([], [], color=colour, label=name) for _, colour, name in layers]
        figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=8.0)
    return figure


def outline(shape: NDArray[np.bool_]) -> NDArray[np.float64]:
    """List the edges of pixels that part a shape from the rest.

    Parameters
    ----------
    shape : bool array (H, W)
        Beyond its border is no shape.

    Returns
    -------
    float64 array (N, 2, 2)
        Both ends, as (column, row), of N edges of length 1. Pixel (0, 0) reaches from -0.5 to 0.5.

    Examples
    --------
    >>> outline(np.array([[False, True, True]])).shape
    (6, 2, 2)
    """
    padded = np.pad(shape, 1)
    rows, columns = np.nonzero(padded[1:] != padded[:-1])
    flat = np.stack([(columns - 1.5, rows - 0.5), (columns - 0.5, rows - 0.5)])
    rows, columns = np.nonzero(padded[:, 1:] != padded[:, :-1])
    upright = np.stack([(columns - 0.5, rows - 1.5), (columns - 0.5, rows - 0.5)])
    edges: NDArray[np.float64] = np.concatenate([flat, upright], axis=2).transpose(2, 0, 1)
    return edges


def _grid(
    count: int, columns: int, tile: tuple[int, ...], aspect: float
) -> tuple[ScanFigure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    ratio = tile[0] * aspect / tile[1]
    size_in = (columns * _TILE_IN, rows * (_TILE_IN * ratio + 0.2) + _TITLE_IN)
    figure = ScanFigure(figsize=size_in, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.set_axis_off()
    return figure, axes[:count]
