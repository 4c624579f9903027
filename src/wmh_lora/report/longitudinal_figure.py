"""The picture of a follow-up: the visits side by side, with lesions outlined by what they did."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from wmh_lora.longitudinal.changes import CHANGES
from wmh_lora.longitudinal.study import FollowUp
from wmh_lora.report.montage import (
    Frame,
    annotate_tile,
    choose_slices,
    edge_letters,
    frame_head,
    position_label,
)
from wmh_lora.view import choose_view
from wmh_lora.volume import Volume

__all__ = ["COLOURS_RGB", "follow_up_figure"]

COLOURS_RGB = {
    "new": (255, 97, 30),
    "grown": (240, 228, 66),
    "shrunk": (86, 180, 233),
    "vanished": (224, 120, 190),
    "stable": (0, 190, 140),
    "doubtful": (110, 120, 255),
    "not assessable": (150, 150, 150),
}
"""Vermilion, yellow, sky blue, purple, green and blue of the Okabe-Ito palette, brightened: told
apart by every reader, and none occurs in a grey picture. What is not assessable is grey."""

_RANKS = (("doubtful",), ("grown", "shrunk"), ("vanished",), ("new",))
"""Changes, in the order of what a reader looks for, last things first."""

_SLICES = 8
_COLUMNS = 4
_TILE_PX = 360  # of the longer side
_BAR_PX = 26
_GAP_PX = 16
_TEXT_RGB = (235, 235, 235)
_TOLD_ML = 0.005  # what two decimals show
_NOTICE = "Research software, not a medical device. Lesions outlined in the space half-way."


def follow_up_figure(
    result: FollowUp,
    scans: Sequence[npt.NDArray[np.float32]],
    changes: npt.NDArray[np.uint8],
) -> Image.Image:
    """Draw slices of the half-way space from the top down, the visits of each side by side.

    Parameters
    ----------
    result : FollowUp
        For the names, volumes and the grid.
    scans : sequence of float arrays
        The visits on the half-way grid.
    changes : uint8 array
        Kinds of change there, for the last interval.

    Returns
    -------
    PIL.Image.Image
        RGB. Each part of the head is shown by the slice with most of its new lesions; without any,
        of those that vanished, or else of those that changed. Changes that are too small are not
        outlined.
    """
    half_way = Volume(scans[0], result.alignment.affine)
    view = choose_view(half_way, 1.0)
    stacks = [view.to_view(scan) for scan in scans]
    kinds = view.to_view(changes)
    frames = [frame_head(stack, kinds > 0) for stack in stacks]
    box = _common_box(frames)
    rows = _rows(frames[0].tissue, kinds)[::-1]  # the top of the head first
    height_mm = (box[0].stop - box[0].start) * view.spacing_mm[1]
    width_mm = (box[1].stop - box[1].start) * view.spacing_mm[2]
    scale = _TILE_PX / max(height_mm, width_mm)
    size_px = (max(1, round(width_mm * scale)), max(1, round(height_mm * scale)))
    tiles = [
        [
            _tile(stack[i][box], kinds[i][box], frame.window, size_px)
            for stack, frame in zip(stacks, frames)
        ]
        for i in rows
    ]
    labels = [position_label(view, half_way, i) for i in rows]
    return _arrange(result, tiles, labels, edge_letters(view, half_way), size_px)


def _common_box(frames: Sequence[Frame]) -> tuple[slice, slice]:
    def around(parts: Sequence[slice]) -> slice:
        return slice(min(p.start for p in parts), max(p.stop for p in parts))

    return around([f.rows for f in frames]), around([f.columns for f in frames])


def _rows(tissue: npt.NDArray[np.bool_], kinds: npt.NDArray[np.uint8]) -> list[int]:
    """Choose slices; what ranks higher is shown however small it is."""
    interest = np.zeros(kinds.shape)
    for rank, names in enumerate(_RANKS):
        interest[np.isin(kinds, [CHANGES[name] for name in names])] = float(kinds[0].size) ** rank
    return choose_slices(tissue, interest if interest.any() else kinds > 0, _SLICES)


def _tile(
    plane: npt.NDArray[np.float32],
    kinds: npt.NDArray[np.uint8],
    window: tuple[float, float],
    size_px: tuple[int, int],
) -> Image.Image:
    low, high = window
    grey = np.clip((plane - low) / (high - low), 0.0, 1.0)
    picture = Image.fromarray(np.round(grey * 255).astype(np.uint8))
    picture = picture.resize(size_px, Image.Resampling.BICUBIC)
    rgb = np.repeat(np.asarray(picture)[..., None], 3, axis=2)
    shown = np.asarray(Image.fromarray(kinds).resize(size_px, Image.Resampling.NEAREST))
    for kind, colour in COLOURS_RGB.items():
        shape = shown == CHANGES[kind]
        rgb[ndimage.binary_dilation(shape) & ~shape] = colour
    return Image.fromarray(rgb)


def _arrange(
    result: FollowUp,
    tiles: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    letters: tuple[str, str],
    size_px: tuple[int, int],
) -> Image.Image:
    """Lay out the visits of a slice side by side, and slices beside each other where they fit."""
    width, height = size_px
    visits = len(result.visits)
    beside = min(len(tiles), max(1, _COLUMNS // visits))
    below = math.ceil(len(tiles) / beside)
    block_px = visits * width + _GAP_PX
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(13)
    legend_px = sum(round(plain.getlength(kind)) + 18 for kind in COLOURS_RGB) + 8
    total = result.totals[-1]
    percent = "" if total.percent is None else f" ({total.percent:+.0f} %)"
    verdict = "within" if total.within_repeatability else "beyond"
    before, after = result.visits[total.before].name, result.visits[total.after].name
    title = (
        f"{before} to {after}: {total.change_ml:+.2f} mL{percent}, {verdict} repeatability "
        f"({total.limit_ml:.2f} mL)"
    )
    canvas_px = max(block_px * beside, legend_px, round(bold.getlength(title)) + 16)
    bottom = 3 * _BAR_PX + height * below
    canvas = Image.new("RGB", (canvas_px, bottom + _BAR_PX))
    draw = ImageDraw.Draw(canvas)
    draw.text((8, _BAR_PX // 2), title, fill=_TEXT_RGB, font=bold, anchor="lm")
    left = 8
    for kind, colour in COLOURS_RGB.items():
        draw.text((left, _BAR_PX * 3 // 2), kind, fill=colour, font=plain, anchor="lm")
        left += round(plain.getlength(kind)) + 18
    place = (8, bottom + _BAR_PX // 2)
    draw.text(place, _NOTICE, fill=_TEXT_RGB, font=plain, anchor="lm")
    for number, pictures in enumerate(tiles):
        row, column = divmod(number, beside)
        for i, (visit, volumes) in enumerate(zip(result.visits, result.volumes, strict=True)):
            x, y = column * block_px + i * width, 3 * _BAR_PX + row * height
            canvas.paste(pictures[i], (x, y))
            annotate_tile(draw, (x, y), size_px, letters, "" if i else labels[number])
            if row == 0:
                text = f"{visit.name}: {volumes.volume_ml:.2f} mL"
                if abs(volumes.volume_ml - volumes.common_ml) >= _TOLD_ML:
                    text += f" ({volumes.common_ml:.2f} in common view)"
                place = (x + 8, _BAR_PX * 5 // 2)
                draw.text(place, text, fill=_TEXT_RGB, font=plain, anchor="lm")
    return canvas
