"""The picture of one scan: slices across the head with the outlines of what was found."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wmh_lora.errors import GridMismatchError
from wmh_lora.evaluation.masks import OTHER_PATHOLOGY_LABEL
from wmh_lora.view import View, choose_view
from wmh_lora.volume import Volume

__all__ = [
    "Frame",
    "annotate_tile",
    "choose_slices",
    "edge_letters",
    "frame_head",
    "lesions_of",
    "montage",
    "png_bytes",
    "position_label",
]

MAX_SLICES = 20
COLUMNS = 5
TILE_PX = 300  # of the longer side of a tile
BAR_PX = 30
_PNG_LEVEL = 3

# Orange and sky blue of the Okabe-Ito palette, brightened: told apart by every reader, and
# neither occurs in a grey picture.
PREDICTION_RGB = (255, 159, 0)
REFERENCE_RGB = (64, 200, 255)
TEXT_RGB = (235, 235, 235)

_EDGE_LETTERS = {0: ("A", "P"), 1: ("R", "L"), 2: ("R", "L")}  # by the world axis across slices
_POSITION_NAMES = {0: "x", 1: "y", 2: "z"}


@dataclass(frozen=True, eq=False)
class Frame:
    """The part of a scan that is worth showing, and how bright.

    Attributes
    ----------
    tissue : bool array (S, H, W)
        Voxels clearly brighter than air, and what was drawn.
    rows, columns : slice
        Hold the head, with two cells around it.
    window : two floats
        Intensities shown as black and as white.
    """

    tissue: NDArray[np.bool_]
    rows: slice
    columns: slice
    window: tuple[float, float]


@dataclass(frozen=True)
class _Panel:
    """What every tile shares."""

    rows: slice
    columns: slice
    size_px: tuple[int, int]  # (width, height)
    window: tuple[float, float]
    letters: tuple[str, str]


def montage(
    volume: Volume,
    mask: NDArray[Any],
    *,
    title: str,
    reference: NDArray[Any] | None = None,
) -> Image.Image:
    """Draw slices of a scan with lesion outlines.

    Slices are shown as radiologists do (the patient's right on the left, anterior up), in their
    true proportions. Outlines run around lesions, not over them.

    Parameters
    ----------
    volume : Volume
        The scan.
    mask : array (I, J, K)
        What was found; non-zero is foreground. Drawn in orange.
    title : str
        One line above the slices.
    reference : array (I, J, K), optional
        Its lesions (`lesions_of`) are drawn in blue below the orange.

    Returns
    -------
    PIL.Image.Image
        RGB.

    Raises
    ------
    GridMismatchError
        If a mask does not have the shape of the scan.
    """
    for array in (mask, reference):
        if array is not None and array.shape != tuple(volume.shape):
            raise GridMismatchError(
                f"The mask has shape {array.shape}, the scan {tuple(volume.shape)}; "
                "a picture needs both on one grid."
            )
    view = choose_view(volume, 1.0)
    scan = view.to_view(volume.finite_data())
    layers = [(view.to_view(mask) != 0, PREDICTION_RGB)]
    if reference is not None:
        layers.insert(0, (view.to_view(lesions_of(reference)), REFERENCE_RGB))
    drawn = reduce(np.logical_or, (layer for layer, _ in layers))
    frame = frame_head(scan, drawn)
    indices = choose_slices(frame.tissue, drawn, MAX_SLICES)
    panel = _panel(view, volume, (frame.rows, frame.columns), frame.window)
    tiles = [_tile(scan[i], [(m[i], c) for m, c in layers], panel) for i in indices]
    labels = [position_label(view, volume, i) for i in indices]
    return _arrange(tiles, labels, panel, title, has_reference=reference is not None)


def png_bytes(picture: Image.Image) -> bytes:
    """Encode a montage as PNG.

    Of drawn slices, level 3 makes as small a file as the usual level 6, in half the time.
    """
    stream = io.BytesIO()
    picture.save(stream, format="PNG", compress_level=_PNG_LEVEL)
    return stream.getvalue()


def lesions_of(reference: NDArray[Any]) -> NDArray[np.bool_]:
    """Return what a reference marks as lesion: all that is not zero, but for other pathology."""
    return np.asarray((reference != 0) & (reference != OTHER_PATHOLOGY_LABEL))


def frame_head(scan: NDArray[np.float32], drawn: NDArray[np.bool_]) -> Frame:
    """Find the head in a scan, and grey levels that suit the brain.

    Parameters
    ----------
    scan : float array (S, H, W)
        Finite intensities.
    drawn : bool array (S, H, W)
        What has to stay inside the frame wherever it lies.
    """
    tissue = _tissue(scan)
    tissue |= drawn
    rows, columns = (
        _extent(tissue.sum(axis=others), drawn.sum(axis=others)) for others in ((0, 2), (0, 1))
    )
    window = _window(scan[:, _inner_half(rows), _inner_half(columns)])
    return Frame(tissue, rows, columns, window)


def choose_slices(tissue: NDArray[np.bool_], lesions: NDArray[Any], count: int) -> list[int]:
    """Choose slices that cover the head evenly and show lesions where there are any.

    The head is cut into ``count`` equal parts; each gives the slice with the largest lesion area,
    or its middle one.

    Parameters
    ----------
    tissue : bool array (S, H, W)
        Foreground.
    lesions : bool or float array (S, H, W)
        Lesions; numbers weigh their pixels.
    count : int
        How many at most.

    Returns
    -------
    list of int
        Ascending slice indices, at least one.

    Examples
    --------
    >>> import numpy as np
    >>> head = np.ones((9, 4, 4), bool)
    >>> spot = np.zeros((9, 4, 4), bool)
    >>> spot[3, 1, 1] = True
    >>> choose_slices(head, spot, 3)
    [1, 3, 7]
    """
    area = tissue.reshape(len(tissue), -1).sum(axis=1)
    lesion_area = lesions.reshape(len(lesions), -1).sum(axis=1)
    shown = np.flatnonzero((area >= 0.2 * area.max()) | (lesion_area > 0))
    first, last = (int(shown[0]), int(shown[-1]) + 1) if len(shown) else (0, len(tissue))
    edges = np.linspace(first, last, min(count, last - first) + 1).round().astype(int)
    chosen = []
    for start, stop in pairwise(edges.tolist()):
        within = lesion_area[start:stop]
        middle = (stop - start) // 2
        chosen.append(start + (int(within.argmax()) if within.any() else middle))
    return chosen


def _tissue(scan: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Voxels clearly brighter than air; good enough to place slices and crop tiles."""
    sample = _thinned(scan)
    low, high = np.percentile(sample, (1.0, 99.0))
    return np.asarray(scan > low + 0.2 * (high - low), dtype=np.bool_)


def _window(scan: NDArray[np.float32]) -> tuple[float, float]:
    """Grey levels of black and white: robust percentiles.

    Only the middle of the head is asked, because fat under the skin would make the brain dark.
    """
    sample = _thinned(scan)
    low = float(np.percentile(sample, 1.0))
    high = float(np.percentile(sample[sample > sample.mean()], 99.7)) if np.ptp(sample) else low
    return (low, high) if high > low else (low, low + 1.0)


def _thinned(scan: NDArray[np.float32]) -> NDArray[np.float32]:
    return scan[:: max(1, len(scan) // 24), ::2, ::2]


def _inner_half(extent: slice) -> slice:
    quarter = (extent.stop - extent.start) // 4
    return slice(extent.start + quarter, extent.stop - quarter)


def _panel(
    view: View, volume: Volume, crop: tuple[slice, slice], window: tuple[float, float]
) -> _Panel:
    rows, columns = crop
    height_mm = (rows.stop - rows.start) * view.spacing_mm[1]
    width_mm = (columns.stop - columns.start) * view.spacing_mm[2]
    scale = TILE_PX / max(height_mm, width_mm)
    size_px = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    return _Panel(rows, columns, size_px, window, edge_letters(view, volume))


def _extent(profile: NDArray[Any], drawn: NDArray[Any]) -> slice:
    """Range that holds the head along one axis, with two cells around it; noise does not count."""
    present = np.flatnonzero((profile > 0.02 * profile.max()) | (drawn > 0))
    if len(present) == 0:
        return slice(0, len(profile))
    return slice(max(0, int(present[0]) - 2), min(len(profile), int(present[-1]) + 3))


def _tile(
    plane: NDArray[np.float32],
    layers: Sequence[tuple[NDArray[np.bool_], tuple[int, int, int]]],
    panel: _Panel,
) -> NDArray[np.uint8]:
    low, high = panel.window
    grey = np.clip((plane[panel.rows, panel.columns] - low) / (high - low), 0.0, 1.0)
    picture = Image.fromarray(np.round(grey * 255).astype(np.uint8))
    picture = picture.resize(panel.size_px, Image.Resampling.BICUBIC)
    rgb = np.repeat(np.asarray(picture)[..., None], 3, axis=2)
    for layer, colour in layers:
        cells = Image.fromarray(layer[panel.rows, panel.columns].astype(np.uint8))
        # nearest keeps the true outline of the voxels
        shape = np.asarray(cells.resize(panel.size_px, Image.Resampling.NEAREST)) > 0
        rgb[_around(shape)] = colour
    return rgb


def _around(shape: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels just outside a shape."""
    grown = np.pad(shape, 1)
    near = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
    return np.asarray(near & ~shape, dtype=np.bool_)


def _arrange(
    tiles: Sequence[NDArray[np.uint8]],
    labels: Sequence[str],
    panel: _Panel,
    title: str,
    *,
    has_reference: bool,
) -> Image.Image:
    width, height = panel.size_px
    columns = min(COLUMNS, len(tiles))
    legend = [("found", PREDICTION_RGB)]
    if has_reference:
        legend.append(("reference", REFERENCE_RGB))
    title = " ".join(title.split())  # names may hold line breaks
    legend_font, title_font = ImageFont.load_default(13), ImageFont.load_default(17)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    needed = math.ceil(ruler.textlength(title, title_font)) + 110 * len(legend) + 20
    canvas_size = (max(columns * width, needed), BAR_PX + math.ceil(len(tiles) / columns) * height)
    canvas = Image.new("RGB", canvas_size)
    draw = ImageDraw.Draw(canvas)
    draw.text((8, BAR_PX // 2), title, fill=TEXT_RGB, font=title_font, anchor="lm")
    for place, (name, colour) in enumerate(reversed(legend)):
        right = canvas.width - 8 - 100 * place
        draw.text((right, BAR_PX // 2), name, fill=colour, font=legend_font, anchor="rm")
    for number, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x, y = (number % columns) * width, BAR_PX + (number // columns) * height
        canvas.paste(Image.fromarray(tile), (x, y))
        annotate_tile(draw, (x, y), panel.size_px, panel.letters, label)
    return canvas


def annotate_tile(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    size_px: tuple[int, int],
    letters: tuple[str, str],
    label: str = "",
) -> None:
    """Write the directions of both edges on a tile, and below, where its slice lies."""
    (x, y), (width, height) = corner, size_px
    _write(draw, (x + 3, y + height // 2), letters[0], "lm")
    _write(draw, (x + width - 3, y + height // 2), letters[1], "rm")
    _write(draw, (x + 4, y + height - 4), label, "ls")


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, anchor: str) -> None:
    """Small text that can be read on bright and dark tissue alike."""
    font = ImageFont.load_default(13)
    draw.text(
        place, text, fill=TEXT_RGB, font=font, anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0)
    )


def edge_letters(view: View, volume: Volume) -> tuple[str, str]:
    """Return the directions of a slice's left and right edge, such as R and L."""
    return _EDGE_LETTERS[_slice_direction(view, volume)]


def _slice_direction(view: View, volume: Volume) -> int:
    """World axis (0 right, 1 anterior, 2 superior) nearest to the direction across slices."""
    return int(io_orientation(volume.affine)[view.axes[0], 0])


def position_label(view: View, volume: Volume, index: int) -> str:
    """Return where a slice lies, in scanner millimetres at its centre: what every viewer shows."""
    native = [(n - 1) / 2.0 for n in view.shape_native]
    axis = view.axes[0]
    native[axis] = float(view.shape_native[axis] - 1 - index if view.flips[0] else index)
    world = _slice_direction(view, volume)
    position = float(volume.affine[world, :3] @ np.asarray(native) + volume.affine[world, 3])
    return f"{_POSITION_NAMES[world]} {position:.0f} mm"
