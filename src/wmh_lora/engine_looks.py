"""Further looks at a scan: in the other planes, if it is as fine in each, and from closer by.

In a slice, a gyrus that rises through it looks like a separate bright focus; in another plane the
same gyrus is seen whole. A network that looks at slices is therefore asked in all three planes,
and its answers are averaged (a 2.5-D ensemble, as in Henschel et al., NeuroImage 219:117012, 2020).
Shown larger, a small lesion covers more of the network's pixels, and its errors are others.

Stacks of the further looks are made of the prepared scan itself, so that all of them share its
intensities and come back to its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from wmh_lora.config import InferenceConfig, PreprocessConfig
from wmh_lora.engine_views import EVIDENCE, SliceMaps
from wmh_lora.preprocess import Prepared
from wmh_lora.view import (
    PLANES,
    Axis,
    Plane,
    View,
    resample_pictures,
    resampling_matrix,
    turn_planes,
)

__all__ = ["Looks", "Stack", "average_looks", "planes_seen", "whole_stack"]

FloatArray = NDArray[np.float32]

_MARGIN_MM = 16.0
"""What a further look shows around the evidence, so that the network knows where it is."""


@dataclass(frozen=True)
class Looks:
    """How a scan is seen.

    Attributes
    ----------
    planes : int
        1, or all 3.
    zoom : float
        How many times larger the prepared plane's slices are seen once more; 1 for not at all.
    """

    planes: int = 1
    zoom: float = 1.0

    @property
    def count(self) -> int:
        """Looks in all."""
        return self.planes + (self.zoom > 1.0)


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
    zoom
        How many times larger than prepared the slices are.
    """

    plane: Plane
    slices: FloatArray
    context_offset: int
    t1: FloatArray | None = None
    rows: int = 0
    columns: int = 0
    zoom: float = 1.0


def planes_seen(config: InferenceConfig, view: View) -> int:
    """Return in how many planes a scan is seen: 3 if asked for and it is as fine in each."""
    return 3 if config.planes == "all" and view.is_isotropic else 1


#: Sees those slices of a stack that are marked (S,).
See = Callable[[Stack, NDArray[np.bool_]], SliceMaps]


def whole_stack(prepared: Prepared, t1: FloatArray | None = None) -> Stack:
    """Return the slices as they were prepared, and a T1 on their grid."""
    return Stack(prepared.view.plane, prepared.slices, prepared.context_offset, t1)


def average_looks(
    slices: Stack,
    prepared: Prepared,
    first: SliceMaps,
    see: See,
    looks: Looks,
    *,
    evidence_only: bool,
) -> SliceMaps:
    """Average what the network says of a scan as it was prepared and in further looks.

    Parameters
    ----------
    slices, prepared
        The scan, from `whole_stack`.
    first
        What was found in the slices as they were prepared.
    see
        Shows slices of another stack.
    looks
        Which there are, the first among them.
    evidence_only
        Show other planes, as the larger look always is, only slices with evidence of lesion in the
        first look, cut to where there is some; what they leave out keeps the first look's
        probability, which is below `wmh_lora.engine_views.EVIDENCE`. Otherwise they are shown
        whole.

    Returns
    -------
    SliceMaps
        On the prepared scan's grid: mean probability, and its standard deviation over all views of
        all looks; structures are those of the first.
    """
    total = first.probability.copy()
    square = first.probability**2
    if first.deviation is not None:
        square += first.deviation**2
    seen = np.ones_like(total)
    evidence = first.probability >= EVIDENCE
    for look in _further_looks(slices, prepared, looks):
        where = evidence if evidence_only or look.zoom > 1.0 else None
        if where is not None and not where.any():
            continue
        stack, marked, window = look.stack(slices, where, prepared.config)
        maps = see(stack, marked)
        total += look.back(window.place(maps.probability))
        spread = maps.probability**2
        if maps.deviation is not None:
            spread += maps.deviation**2
        square += look.back(window.place(spread))
        shown = np.broadcast_to(marked[:, None, None], stack.slices.shape)
        seen += look.back(window.place(shown))
    total /= seen
    square /= seen
    deviation = np.sqrt(np.maximum(square - total**2, 0.0))
    return SliceMaps(total, deviation.astype(np.float32), first.structures)


@dataclass(frozen=True)
class _Further:
    """A look at the whole of a prepared scan on another grid.

    Attributes
    ----------
    plane, context_offset, zoom
        See `Stack`.
    reach
        Slices that are shown on either side of one with evidence.
    there, back
        Bring (S, H, W) of the prepared scan to the other grid, and what is found there back.
    """

    plane: Plane
    context_offset: int
    reach: int
    there: Callable[[FloatArray], FloatArray]
    back: Callable[[FloatArray], FloatArray]
    zoom: float = 1.0

    def stack(
        self, slices: Stack, evidence: NDArray[np.bool_] | None, config: PreprocessConfig
    ) -> tuple[Stack, NDArray[np.bool_], _Window]:
        """Return what is to be shown, which of its slices, and where it lies on the other grid."""
        grid = self.there(slices.slices)
        marked, window = np.ones(len(grid), np.bool_), _Window.whole(grid.shape)
        if evidence is not None:
            where = self.there(evidence.astype(np.float32)) > 0.0
            margin = round(_MARGIN_MM * self.zoom / config.pixel_size_mm)
            marked, window = _near(where, self.reach, margin)
        window = window.fitted(config.multiple_px)
        stack = Stack(
            self.plane,
            window.cut(grid),
            self.context_offset,
            None if slices.t1 is None else window.cut(self.there(slices.t1)),
            window.top,
            window.left,
            self.zoom,
        )
        return stack, marked, window


def _further_looks(slices: Stack, prepared: Prepared, looks: Looks) -> Iterator[_Further]:
    if looks.planes > 1:
        for plane in PLANES:
            if plane != slices.plane:
                yield _turned(slices, prepared, plane)
    if looks.zoom > 1.0:
        yield _larger(slices, looks.zoom)


def _turned(slices: Stack, prepared: Prepared, plane: Plane) -> _Further:
    pixel_mm, spacing_mm = prepared.config.pixel_size_mm, prepared.view.spacing_mm[0]
    count = len(slices.slices)
    # between the slices as they lie and steps of one pixel along them
    acquired = Axis(0.0, spacing_mm, count)
    pixels = Axis(0.0, pixel_mm, max(1, round(count * spacing_mm / pixel_mm)))
    stretch, shrink = resampling_matrix(acquired, pixels), resampling_matrix(pixels, acquired)
    offset = max(1, round(prepared.config.context_mm / pixel_mm))
    return _Further(
        plane,
        offset,
        reach=offset,
        there=lambda maps: turn_planes(_along(stretch, maps), slices.plane, plane),
        back=lambda maps: _along(shrink, turn_planes(maps, plane, slices.plane)),
    )


def _larger(slices: Stack, zoom: float) -> _Further:
    pixels = [
        (Axis(0.0, 1.0, size), Axis(0.0, 1.0 / zoom, round(size * zoom)))
        for size in slices.slices.shape[1:]
    ]
    enlarge = [resampling_matrix(own, other) for own, other in pixels]
    reduce = [resampling_matrix(other, own) for own, other in pixels]
    return _Further(
        slices.plane,
        slices.context_offset,
        reach=0,  # a look at the same slice finds little where the first one found nothing
        there=partial(resample_pictures, *enlarge),
        back=partial(resample_pictures, *reduce),
        zoom=zoom,
    )


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

    def place(self, maps: NDArray[np.generic]) -> FloatArray:
        """Put maps of this part into a stack of zeros."""
        whole = np.zeros(self.shape, np.float32)
        part = self._of(whole)
        part[...] = maps[:, : part.shape[1], : part.shape[2]]
        return whole

    def _of(self, stack: FloatArray) -> FloatArray:
        return stack[:, self.top : self.top + self.height, self.left : self.left + self.width]


def _near(
    evidence: NDArray[np.bool_], reach: int, margin: int
) -> tuple[NDArray[np.bool_], _Window]:
    """Mark the slices with evidence and their neighbours, and frame the evidence with a margin."""
    found = np.asarray(evidence.any(axis=(1, 2)))
    marked = np.asarray(ndimage.maximum_filter1d(found, 2 * reach + 1, mode="constant"))
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
