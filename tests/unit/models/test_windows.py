"""Cutting maps into windows: every token in exactly one, each window's tokens in raster order."""

from __future__ import annotations

import pytest
import torch

from wmh_lora.models.windows import window_order

CPU = torch.device("cpu")
SIZES = [(1, 6, 9, 3), (2, 7, 8, 3), (1, 2, 5, 3), (2, 2, 2, 7), (3, 4, 1, 2)]


@pytest.mark.parametrize(("batch", "height", "width", "side"), SIZES)
def test_groups_hold_windows(batch: int, height: int, width: int, side: int) -> None:
    order = window_order(batch, height, width, side, CPU)
    assert torch.equal(order.order.sort().values, torch.arange(batch * height * width))
    assert torch.equal(order.order[order.inverse], torch.arange(batch * height * width))
    assert order.groups[0].start == 0
    assert order.groups[-1].stop == batch * height * width
    for group in order.groups:
        for window in order.order[group.start : group.stop].view(-1, group.rows, group.cols):
            image, y, x = window // (height * width), window // width % height, window % width
            assert bool((image == image[0, 0]).all())
            top, left = int(y[0, 0]), int(x[0, 0])
            assert top % side == 0
            assert left % side == 0
            # It reaches as far as its side or the map allows, and holds its tokens in order.
            assert group.rows == min(side, height - top)
            assert group.cols == min(side, width - left)
            assert torch.equal(y, top + torch.arange(group.rows)[:, None].expand_as(y))
            assert torch.equal(x, left + torch.arange(group.cols).expand_as(x))


def test_groups_follow_each_other_and_differ_in_extent() -> None:
    groups = window_order(2, 7, 8, 3, CPU).groups
    assert [g.start for g in groups[1:]] == [g.stop for g in groups[:-1]]
    assert len({(g.rows, g.cols) for g in groups}) == len(groups) == 4


def test_what_inference_leaves_behind_serves_training() -> None:
    window_order.cache_clear()
    with torch.inference_mode():
        order = window_order(1, 3, 4, 2, CPU)
    tokens = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens.index_select(0, order.order).square().sum().backward()
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, 2 * tokens.detach())
