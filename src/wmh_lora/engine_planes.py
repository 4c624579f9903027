"""A scan that is as fine in every plane, seen in axial, coronal and sagittal slices.

In a slice, a gyrus that rises through it looks like a separate bright focus; in another plane the
same gyrus is seen whole. A network that looks at slices is therefore asked in all three planes,
and its answers are averaged (a 2.5-D ensemble, as in Henschel et al., NeuroImage 219:117012, 2020).

Stacks of the further planes are turned out of the prepared scan itself, so that all of them share
its intensities and its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.engine_views import EVIDENCE, SliceMaps
from wmh_lora.preprocess import Prepared
from wmh_lora.view import PLANES, Axis, Plane, resampling_matrix, turn_planes

__all__ = ["Stack", "average_planes", "whole_stack"]

FloatArray = NDArray[np.float32]

_MARGIN_MM = 16.0
"""What a further plane shows around the evidence, so that the network knows where it is."""


@dataclass(frozen=True)
class Stack:
    """Slices of one plane of a prepared scan.

    Attributes
    ----------
    plane
        Which.
    slices
        (S, H, W) float32 in [0, 1], H and W multiples of the network's.
    context_offset
        Distance, in slices, of the neighbours shown beside each slice.
    rows, columns
        First row and column on the whole plane; tells two cuts of it apart.
    """

    plane: Plane
    slices: FloatArray
    context_offset: int
    rows: int = 0
    columns: int = 0


#: Sees those slices of a stack that are marked (S,); all for None.
See = Callable[[Stack, NDArray[np.bool_]], SliceMaps]


def whole_stack(prepared: Prepared) -> Stack:
    """Return the slices as they were prepared."""
    return Stack(prepared.view.plane, prepared.slices, prepared.context_offset)


def average_planes(
    prepared: Prepared, first: SliceMaps, see: See, *, evidence_only: bool
) -> SliceMaps:
    """Average what the network says of a scan in the plane that it was prepared in and the others.

    Parameters
    ----------
    prepared
        The scan.
    first
        What was found in its own plane.
    see
        Shows slices of another plane.
    evidence_only
        Show of the other planes only slices with evidence of lesion in the first, cut to where
        there is some; what they leave out keeps the first plane's probability, which is below
        `wmh_lora.engine_views.EVIDENCE`. Otherwise they are shown whole.

    Returns
    -------
    SliceMaps
        On the prepared scan's grid: mean probability, and its standard deviation over all views of
        all planes; structures are those of the first plane.
    """
    total = first.probability.copy()
    square = first.probability**2
    if first.deviation is not None:
        square += first.deviation**2
    seen = np.ones_like(total)
    evidence = first.probability >= EVIDENCE if evidence_only else None
    for stack, marked, place in _other_stacks(prepared, evidence):
        maps = see(stack, marked)
        deviation = maps.deviation
        spread = maps.probability**2 + (0.0 if deviation is None else deviation**2)
        shown = np.broadcast_to(marked[:, None, None], stack.slices.shape).astype(np.float32)
        for sum_of, part in ((total, maps.probability), (square, spread), (seen, shown)):
            sum_of += place(part)
    total /= seen
    square /= seen
    deviation = np.sqrt(np.maximum(square - total**2, 0.0))
    return SliceMaps(total, deviation.astype(np.float32), first.structures)


def _other_stacks(
    prepared: Prepared, evidence: NDArray[np.bool_] | None
) -> Iterator[tuple[Stack, NDArray[np.bool_], Callable[[FloatArray], FloatArray]]]:
    """Yield a stack a plane, its slices to be shown, and what brings its maps back."""
    config, view = prepared.config, prepared.view
    pixel_mm = config.pixel_size_mm
    count = len(prepared.slices)
    # between the slices as they lie and steps of one pixel along them
    slices = Axis(0.0, view.spacing_mm[0], count)
    pixels = Axis(0.0, pixel_mm, max(1, round(count * slices.step_mm / pixel_mm)))
    there, back = resampling_matrix(slices, pixels), resampling_matrix(pixels, slices)
    grid = _along(there, prepared.slices)
    where = None if evidence is None else _along(there, evidence.astype(np.float32)) > 0.0
    for plane in PLANES:
        if plane == view.plane:
            continue
        turned = turn_planes(grid, view.plane, plane)
        found = None if where is None else turn_planes(where, view.plane, plane)
        if found is None:
            marked = np.asarray(turned.any(axis=(1, 2)))
            windows = [(0, length) for length in turned.shape[1:]]
        else:
            if not found.any():
                continue
            reach = max(1, round(config.context_mm / pixel_mm))
            marked = np.asarray(found.any(axis=(1, 2)))
            marked = np.asarray(ndimage.maximum_filter1d(marked, 2 * reach + 1, mode="constant"))
            margin = round(_MARGIN_MM / pixel_mm)
            windows = [_extent(np.asarray(found.any(axis=(0, other))), margin) for other in (2, 1)]
        (top, height), (left, width) = (
            _fitted(window, length, config.multiple_px)
            for window, length in zip(windows, turned.shape[1:], strict=True)
        )
        shape = turned.shape
        cut = np.zeros((shape[0], height, width), np.float32)
        part = turned[:, top : top + height, left : left + width]
        cut[:, : part.shape[1], : part.shape[2]] = part
        offset = max(1, round(config.context_mm / pixel_mm))

        def place(
            maps: FloatArray,
            *,
            plane: Plane = plane,
            shape: tuple[int, ...] = shape,
            top: int = top,
            left: int = left,
        ) -> FloatArray:
            whole = np.zeros(shape, np.float32)
            target = whole[:, top : top + maps.shape[1], left : left + maps.shape[2]]
            target[...] = maps[:, : target.shape[1], : target.shape[2]]
            return _along(back, turn_planes(whole, plane, view.plane))

        yield Stack(plane, cut, offset, top, left), marked, place


def _along(matrix: FloatArray, stack: FloatArray) -> FloatArray:
    """Resample (S, H, W) along its slices; nothing is done where the steps are equal."""
    if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
        return stack
    return np.asarray(np.tensordot(matrix, stack, axes=1), dtype=np.float32)


def _extent(marked: NDArray[np.bool_], margin: int) -> tuple[int, int]:
    """First and one-past-last marked place, with a margin."""
    places = np.flatnonzero(marked)
    return max(0, int(places[0]) - margin), min(len(marked), int(places[-1]) + 1 + margin)


def _fitted(window: tuple[int, int], length: int, multiple: int) -> tuple[int, int]:
    """Start and size of a window that has grown to a multiple, within the picture if it can."""
    size = -(-(window[1] - window[0]) // multiple) * multiple
    return max(0, min(window[0], length - size)), size
