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

from wmh_lora.config import PreprocessConfig
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
    t1
        (S, H, W) in [0, 1], a T1 on the same grid; None if there is none.
    rows, columns
        First row and column on the whole plane; tells two cuts of it apart.
    """

    plane: Plane
    slices: FloatArray
    context_offset: int
    t1: FloatArray | None = None
    rows: int = 0
    columns: int = 0


#: Sees those slices of a stack that are marked (S,).
See = Callable[[Stack, NDArray[np.bool_]], SliceMaps]


def whole_stack(prepared: Prepared, t1: FloatArray | None = None) -> Stack:
    """Return the slices as they were prepared, and a T1 on their grid."""
    return Stack(prepared.view.plane, prepared.slices, prepared.context_offset, t1)


def average_planes(
    slices: Stack, prepared: Prepared, first: SliceMaps, see: See, *, evidence_only: bool
) -> SliceMaps:
    """Average what the network says of a scan in the plane that it was prepared in and the others.

    Parameters
    ----------
    slices, prepared
        The scan, from `whole_stack`.
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
    for stack, marked, place in _other_stacks(slices, prepared, evidence):
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
    slices: Stack, prepared: Prepared, evidence: NDArray[np.bool_] | None
) -> Iterator[tuple[Stack, NDArray[np.bool_], Callable[[FloatArray], FloatArray]]]:
    """Yield a stack a plane, its slices to be shown, and what brings its maps back."""
    config, spacing_mm = prepared.config, prepared.view.spacing_mm[0]
    pixel_mm = config.pixel_size_mm
    count = len(slices.slices)
    # between the slices as they lie and steps of one pixel along them
    acquired = Axis(0.0, spacing_mm, count)
    pixels = Axis(0.0, pixel_mm, max(1, round(count * spacing_mm / pixel_mm)))
    there, back = resampling_matrix(acquired, pixels), resampling_matrix(pixels, acquired)
    grid = _along(there, slices.slices)
    t1 = None if slices.t1 is None else _along(there, slices.t1)
    where = None if evidence is None else _along(there, evidence.astype(np.float32)) > 0.0
    if where is not None and not where.any():
        return
    for plane in PLANES:
        if plane == slices.plane:
            continue
        turned = turn_planes(grid, slices.plane, plane)
        marked, window = np.ones(len(turned), np.bool_), _Window.whole(turned.shape)
        if where is not None:
            marked, window = _near(turn_planes(where, slices.plane, plane), config)
        window = window.fitted(config.multiple_px)
        second = None
        if t1 is not None:
            second = window.cut(turn_planes(t1, slices.plane, plane))
        offset = max(1, round(config.context_mm / pixel_mm))
        stack = Stack(plane, window.cut(turned), offset, second, window.top, window.left)

        def place(
            maps: FloatArray, *, plane: Plane = plane, window: _Window = window
        ) -> FloatArray:
            return _along(back, turn_planes(window.place(maps), plane, slices.plane))

        yield stack, marked, place


@dataclass(frozen=True)
class _Window:
    """A part of every slice of a stack; it may reach beyond the picture, where that is zero."""

    shape: tuple[int, ...]
    top: int
    left: int
    height: int
    width: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> _Window:
        """Return the window that holds whole slices of a stack (S, H, W)."""
        return cls(shape, 0, 0, shape[1], shape[2])

    def fitted(self, multiple: int) -> _Window:
        """Grow to a multiple of so many pixels, within the picture where it is large enough."""
        sides = []
        for start, size, length in (
            (self.top, self.height, self.shape[1]),
            (self.left, self.width, self.shape[2]),
        ):
            grown = -(-size // multiple) * multiple
            sides.append((max(0, min(start, length - grown)), grown))
        (top, height), (left, width) = sides
        return _Window(self.shape, top, left, height, width)

    def cut(self, stack: FloatArray) -> FloatArray:
        """Copy this part of a stack."""
        out = np.zeros((len(stack), self.height, self.width), np.float32)
        part = self._of(stack)
        out[:, : part.shape[1], : part.shape[2]] = part
        return out

    def place(self, maps: FloatArray) -> FloatArray:
        """Put maps of this part into a stack of zeros."""
        whole = np.zeros(self.shape, np.float32)
        part = self._of(whole)
        part[...] = maps[:, : part.shape[1], : part.shape[2]]
        return whole

    def _of(self, stack: FloatArray) -> FloatArray:
        return stack[:, self.top : self.top + self.height, self.left : self.left + self.width]


def _near(
    evidence: NDArray[np.bool_], config: PreprocessConfig
) -> tuple[NDArray[np.bool_], _Window]:
    """Mark the slices with evidence and their neighbours, and frame the evidence with a margin."""
    reach = max(1, round(config.context_mm / config.pixel_size_mm))
    found = np.asarray(evidence.any(axis=(1, 2)))
    marked = np.asarray(ndimage.maximum_filter1d(found, 2 * reach + 1, mode="constant"))
    margin = round(_MARGIN_MM / config.pixel_size_mm)
    (top, bottom), (left, right) = (
        _extent(np.asarray(evidence.any(axis=(0, other))), margin) for other in (2, 1)
    )
    return marked, _Window(evidence.shape, top, left, bottom - top, right - left)


def _along(matrix: FloatArray, stack: FloatArray) -> FloatArray:
    """Resample (S, H, W) along its slices; nothing is done where the steps are equal."""
    if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
        return stack
    return np.asarray(np.tensordot(matrix, stack, axes=1), dtype=np.float32)


def _extent(marked: NDArray[np.bool_], margin: int) -> tuple[int, int]:
    """First and one-past-last marked place, with a margin."""
    places = np.flatnonzero(marked)
    return max(0, int(places[0]) - margin), min(len(marked), int(places[-1]) + 1 + margin)
