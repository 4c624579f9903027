"""A scan's slices seen in several views: which slices in which, and the average.

A view is (quarter turns, mirrored first). The flips are members of the dihedral group: two quarter
turns and a left-right mirror make an anterior-posterior mirror.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from wmh_lora.config import TtaMode

__all__ = [
    "EVIDENCE",
    "STRUCTURE_LEVEL",
    "VIEWS",
    "JoinedProgress",
    "Look",
    "ProgressCallback",
    "Seen",
    "SliceMaps",
    "ViewKey",
    "average_views",
    "slices_with_evidence",
    "turn",
    "turn_back",
]

FloatArray = NDArray[np.float32]
ViewKey = tuple[int, bool]

#: Called with (steps done, steps in all); a step is one slice in one view.
ProgressCallback = Callable[[int, int], None]

VIEWS: Mapping[TtaMode, tuple[ViewKey, ...]] = {
    "none": ((0, False),),
    "flip": ((0, False), (0, True), (2, False), (2, True)),
    "d4": tuple((turns, mirrored) for mirrored in (False, True) for turns in range(4)),
}
"""Members of each set of views, the plain one first."""

EVIDENCE = 0.1
"""Probability in the first view from which a slice and its neighbours are seen again."""

STRUCTURE_LEVEL = 127.5
"""Probability one half of `SliceMaps.structures`."""


@dataclass(frozen=True)
class Seen:
    """What the network says of a batch in one view.

    Attributes
    ----------
    lesion : float32 array (B, H, W)
        Probability of lesion.
    structures : mapping of str to uint8 array (B, H, W)
        Probability of ventricles and brain, in steps of 1/255.
    """

    lesion: FloatArray
    structures: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)

    def split(self) -> list[Seen]:
        """Take a batch apart, slice by slice."""
        return [
            Seen(
                self.lesion[index : index + 1],
                {name: part[index : index + 1] for name, part in self.structures.items()},
            )
            for index in range(len(self.lesion))
        ]

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """Put the parts of a batch together again."""
        return cls(
            np.concatenate([part.lesion for part in parts]),
            {
                name: np.concatenate([part.structures[name] for part in parts])
                for name in parts[0].structures
            },
        )


@dataclass(frozen=True)
class SliceMaps:
    """Maps on the network's grid (S, H, W).

    Attributes
    ----------
    probability : float32
        Mean probability of lesion over the views.
    deviation : float32 or None
        Its standard deviation; zero where a slice was seen once, None for a single view.
    structures : mapping of str to uint8
        Probability of ventricles and brain in the first view, in steps of 1/255.
    """

    probability: FloatArray
    deviation: FloatArray | None
    structures: Mapping[str, NDArray[np.uint8]]


#: Shows slices, by their indices, in one view.
Look = Callable[[Sequence[int], ViewKey], Seen]


def turn(slices: Tensor, view: ViewKey) -> Tensor:
    """Show (..., H, W) as one member of the dihedral group; odd turns swap H and W."""
    turns, mirrored = view
    if mirrored:
        slices = slices.flip(-1)
    return torch.rot90(slices, turns, (-2, -1))


def turn_back(maps: Tensor, view: ViewKey) -> Tensor:
    """Undo `turn`."""
    turns, mirrored = view
    maps = torch.rot90(maps, -turns, (-2, -1))
    return maps.flip(-1) if mirrored else maps


def slices_with_evidence(probability: FloatArray, reach: int) -> NDArray[np.bool_]:
    """Mark the slices of (S, H, W) whose highest probability is at least `EVIDENCE`, and around.

    Parameters
    ----------
    probability : float32 array (S, H, W)
        Of the first view.
    reach : int
        Slices marked on either side of one with evidence.
    """
    found = probability.max(axis=(1, 2)) >= EVIDENCE
    return np.asarray(ndimage.maximum_filter1d(found, 2 * reach + 1, mode="constant"))


def average_views(
    look: Look,
    shape: tuple[int, int, int],
    views: Sequence[ViewKey],
    batch_size: int,
    *,
    shown: NDArray[np.bool_] | None = None,
    reach: int | None = None,
    progress: ProgressCallback | None = None,
) -> SliceMaps:
    """See slices in the first view, and those that it pays for in the others.

    Parameters
    ----------
    look : callable
        Shows slices in one view.
    shape : tuple of int
        (S, H, W) of the network's grid.
    views : sequence
        The members of one set of `VIEWS`.
    batch_size : int
        Slices shown at once; does not change the result.
    shown : bool array (S,), optional
        Slices that are seen at all; the others have probability zero. By default all.
    reach : int, optional
        Leave out the further views of slices that are more than this many slices away from
        evidence of lesion, see `slices_with_evidence`. By default every slice is seen in all.
    progress : callable, optional
        The number of steps in all falls when views are left out.
    """
    probability = np.zeros(shape, dtype=np.float32)
    structures: dict[str, NDArray[np.uint8]] = {}
    chosen = list(range(shape[0])) if shown is None else np.flatnonzero(shown).tolist()
    steps = _Steps(len(chosen) * len(views), progress)
    first, *others = views
    for batch in _batches(chosen, batch_size):
        seen = look(batch, first)
        probability[batch] = seen.lesion
        for name, found in seen.structures.items():
            structures.setdefault(name, np.zeros(shape, np.uint8))[batch] = found
        steps.take(len(batch))
    if not others:
        return SliceMaps(probability, None, structures)
    if reach is not None:
        again = slices_with_evidence(probability, reach)
        left_out = len(chosen)
        chosen = [index for index in chosen if again[index]]
        steps.drop((left_out - len(chosen)) * len(others))
    deviation = np.zeros(shape, dtype=np.float32)
    for batch in _batches(chosen, batch_size):
        maps = [probability[batch]]
        for view in others:
            maps.append(look(batch, view).lesion)
            steps.take(len(batch))
        summed = maps[0].copy()
        for part in maps[1:]:
            summed += part
        probability[batch] = summed / np.float32(len(views))
        deviation[batch] = np.std(maps, axis=0)
    return SliceMaps(probability, deviation, structures)


def _batches(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


class JoinedProgress:
    """Tells of several runs of `average_views` as of one.

    Parameters
    ----------
    progress : callable
        Called with the steps of all runs; before a run has begun, it counts as much as the first.
    runs : int
        How many there will be.
    """

    def __init__(self, progress: ProgressCallback, runs: int) -> None:
        self._progress, self._runs = progress, runs
        self._parts: list[tuple[int, int]] = []

    def part(self) -> ProgressCallback:
        """Return the callback of the next run."""
        self._parts.append((0, 0))
        number = len(self._parts) - 1

        def tell(done: int, total: int) -> None:
            self._parts[number] = done, total
            coming = (self._runs - len(self._parts)) * self._parts[0][1]
            self._progress(
                sum(done for done, _ in self._parts),
                sum(total for _, total in self._parts) + coming,
            )

        return tell

    def finish(self) -> None:
        """Tell that no further run will come, as where a scan has nothing to look at again."""
        if self._parts:
            steps = sum(done for done, _ in self._parts)
            self._progress(steps, steps)


class _Steps:
    """Counts the steps for a progress callback."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def take(self, count: int) -> None:
        self._done += count
        self._tell()

    def drop(self, count: int) -> None:
        self._total -= count
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total)
