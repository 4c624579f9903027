"""Cutting a map into square windows, without padding it to whole ones.

Windows at the bottom and right edge may reach beyond the map. The tokens of a batch of maps are put
in the order of their windows, windows of equal extent together, so that a layer before or after
works on the tokens that exist, and each group of equal windows is one view.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["WindowGroup", "WindowOrder", "bands", "window_order"]

_REMEMBERED = 64  # layouts; a scan needs one for each window side and batch size


class WindowGroup(NamedTuple):
    """Windows of equal extent: tokens ``start`` to ``stop``, ``rows`` x ``cols`` a window."""

    start: int
    stop: int
    rows: int
    cols: int


class WindowOrder(NamedTuple):
    """Where tokens go.

    Attributes
    ----------
    order : Tensor
        (B * h * w,) place on the maps, in raster order, of each token in window order.
    inverse : Tensor
        (B * h * w,) place in window order of each token of the maps.
    groups : tuple of WindowGroup
        One to four.
    """

    order: Tensor
    inverse: Tensor
    groups: tuple[WindowGroup, ...]


def bands(length: int, side: int) -> Iterator[tuple[int, int, int]]:
    """Cut an axis into (start, stop, extent of a window): whole windows, then what is left."""
    whole = length - length % side
    if whole:
        yield 0, whole, side
    if whole < length:
        yield whole, length, length - whole


@lru_cache(maxsize=_REMEMBERED)
def window_order(
    batch: int, height: int, width: int, side: int, device: torch.device
) -> WindowOrder:
    """Put the tokens of ``batch`` maps in the order of windows of ``side`` x ``side`` tokens.

    Examples
    --------
    >>> order = window_order(1, 2, 3, 2, torch.device("cpu"))
    >>> order.order.tolist()
    [0, 1, 3, 4, 2, 5]
    >>> [tuple(group) for group in order.groups]
    [(0, 4, 2, 2), (4, 6, 2, 1)]
    """
    with torch.inference_mode(False):  # a tensor born in inference mode could not serve training
        places = torch.arange(batch * height * width, device=device).view(batch, height, width)
        parts: list[Tensor] = []
        groups: list[WindowGroup] = []
        start = 0
        for top, bottom, rows in bands(height, side):
            for left, right, cols in bands(width, side):
                part = places[:, top:bottom, left:right]
                part = part.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).transpose(2, 3)
                parts.append(part.flatten())
                groups.append(WindowGroup(start, start + part.numel(), rows, cols))
                start += part.numel()
        order = torch.cat(parts)
        return WindowOrder(order, torch.argsort(order), tuple(groups))
