"""Self-attention of SAM's image encoder: decomposed relative positions, in windows or over all.

The score of a query and a key gets two additive terms, products of the query with an embedding of
the distance in rows and of the distance in columns (decomposed relative positions, Li et al.,
MViTv2, CVPR 2022, equations 5 and 6).

Windows may reach beyond the map. There, as published, tokens of zeros join the map after its
normalisation, so that each of them has the projection's bias as key and value. These keys and
values are filled in without being computed; padded queries, whose results would be dropped, do not
exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from wmh_lora.models.linear import Linear
from wmh_lora.models.windows import bands

__all__ = ["Attention", "biased_attention", "relative_positions"]

PIECE_SCORES = 2**22  # computed at a time: 16 MB of float32, reused by the next piece
PIECE_QUERIES = (128, 256)  # fewest and most: fewer make slow products, more leave the cache


def relative_positions(table: Tensor, size: int) -> Tensor:
    """Embeddings of the offset between every query and key along one axis.

    A table for another size is interpolated linearly, as Segment Anything does.

    Parameters
    ----------
    table : Tensor
        (2 * side - 1, width): embeddings of the offsets from ``1 - side`` to ``side - 1``.
    size : int
        Number of positions along the axis.

    Returns
    -------
    Tensor
        (size, size, width), by query, then key.
    """
    length = 2 * size - 1
    if len(table) != length:
        table = F.interpolate(table.t()[None], size=length, mode="linear")[0].t()
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + (size - 1)]


def _pieces(q: Tensor, keys: int) -> Iterator[tuple[slice, slice]]:
    """Cut (windows, heads, queries, width) into slices of windows and of queries."""
    n, heads, queries, _ = q.shape
    fewest, most = PIECE_QUERIES
    count = -(-queries // min(most, max(fewest, PIECE_SCORES // (heads * keys))))
    windows = max(1, PIECE_SCORES // (heads * queries * keys))
    step = -(-queries // count)  # pieces of nearly equal size
    for first in range(0, n, windows):
        for top in range(0, queries, step):
            yield slice(first, first + windows), slice(top, top + step)


def _dense_bias(rel_rows: Tensor, rel_cols: Tensor) -> Tensor:
    """(..., rows) and (..., columns) -> (..., rows * columns), the sum for each key."""
    return (rel_rows.unsqueeze(-1) + rel_cols.unsqueeze(-2)).flatten(-2)


class _BiasedAttention(torch.autograd.Function):
    """`biased_attention`, piece by piece; scores are computed again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rel_rows: Tensor, rel_cols: Tensor
    ) -> Tensor:
        n, heads, queries, width = q.shape
        out = q.new_empty(n, queries, heads, width).transpose(1, 2)
        for windows, part in _pieces(q, k.shape[2]):
            bias = _dense_bias(rel_rows[windows, :, part], rel_cols[windows, :, part])
            out[windows, :, part] = F.scaled_dot_product_attention(
                q[windows, :, part], k[windows], v[windows], attn_mask=bias
            )
        ctx.save_for_backward(q, k, v, rel_rows, rel_cols, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, rel_rows, rel_cols, out = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_rows, grad_cols = map(torch.empty_like, (q, rel_rows, rel_cols))
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for windows, part in _pieces(q, k.shape[2]):
            at = (windows, slice(None), part)
            scores = _dense_bias(rel_rows[at], rel_cols[at])
            scores += (q[at] * scale) @ k[windows].transpose(-2, -1)
            weights = scores.softmax(dim=-1)
            grad_v[windows] += weights.transpose(-2, -1) @ grad[at]
            # The softmax's Jacobian: weights * (gradient - its weighted mean).
            grad_scores = grad[at] @ v[windows].transpose(-2, -1)
            grad_scores -= (grad[at] * out[at]).sum(dim=-1, keepdim=True)
            grad_scores *= weights
            grad_q[at] = (grad_scores @ k[windows]) * scale
            grad_k[windows] += grad_scores.transpose(-2, -1) @ (q[at] * scale)
            by_axis = grad_scores.unflatten(-1, (rel_rows.shape[-1], rel_cols.shape[-1]))
            grad_rows[at], grad_cols[at] = by_axis.sum(dim=-1), by_axis.sum(dim=-2)
        return grad_q, grad_k, grad_v, grad_rows, grad_cols


def biased_attention(q: Tensor, k: Tensor, v: Tensor, rel_rows: Tensor, rel_cols: Tensor) -> Tensor:
    """Scaled dot-product attention to a grid of keys, biased by the key's row and column.

    The scores of all queries never exist together, neither here nor in the gradient, so that
    memory grows with the number of tokens and not with its square.

    Parameters
    ----------
    q : Tensor
        (windows, heads, queries, width).
    k, v : Tensor
        (windows, heads, rows * columns, width), in raster order.
    rel_rows, rel_cols : Tensor
        (windows, heads, queries, rows) and (windows, heads, queries, columns), added to the scores
        of the keys in that row and column.

    Returns
    -------
    Tensor
        (windows, heads, queries, width). Gradients of first order only.
    """
    out: Tensor = _BiasedAttention.apply(q, k, v, rel_rows, rel_cols)  # type: ignore[no-untyped-call]
    return out


class Attention(nn.Module):
    """Multi-head self-attention of a map of tokens.

    Parameters
    ----------
    dim : int
        Token width.
    heads : int
        Number of heads, each of width ``dim // heads``.
    window : int
        Side in tokens of the windows that attention is confined to; 0: the whole map.
    side : int
        Side in tokens of the map that the stored relative positions of a global block belong to.
    """

    def __init__(self, dim: int, heads: int, window: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        offsets = 2 * (window or side) - 1
        self.rel_pos_h = nn.Parameter(torch.zeros(offsets, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(offsets, dim // heads))

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend, (B, h, w, dim) -> (B, h, w, dim)."""
        h, w = tokens.shape[1:3]
        side_h, side_w = self.window or h, self.window or w
        rel_h = relative_positions(self.rel_pos_h, side_h)
        rel_w = relative_positions(self.rel_pos_w, side_w)
        qkv: Tensor = self.qkv(tokens)
        padding = self._padding(tokens) if h % side_h or w % side_w else None
        mixed = qkv.new_empty(tokens.shape)
        for top, bottom, rows in bands(h, side_h):
            for left, right, cols in bands(w, side_w):
                part = mixed[:, top:bottom, left:right]
                windows = _split(qkv[:, top:bottom, left:right], rows, cols, self.heads)
                out = self._attend(windows, rel_h[:rows], rel_w[:cols], padding)
                part.copy_(_join(out, part.shape, rows, cols))
        attended: Tensor = self.proj(mixed)
        return attended

    def _attend(
        self, windows: Tensor, rel_h: Tensor, rel_w: Tensor, padding: Tensor | None
    ) -> Tensor:
        """Attend within windows of equal extent.

        ``windows`` is (3, windows, heads, rows * cols, width). ``rel_h`` (rows, side, width) and
        ``rel_w`` (cols, side, width) hold the relative positions of the real queries and of all
        keys; keys beyond the extent are padding.
        """
        q, k, v = windows
        (rows, side_h, _), (cols, side_w, _) = rel_h.shape, rel_w.shape
        by_place = q.unflatten(2, (rows, cols))
        rel_rows = torch.einsum("nhrcd,rkd->nhrck", by_place, rel_h).flatten(2, 3)
        rel_cols = torch.einsum("nhrcd,ckd->nhrck", by_place, rel_w).flatten(2, 3)
        if padding is not None and (rows, cols) != (side_h, side_w):
            _, pad_k, pad_v = padding.view(3, self.heads, 1, 1, -1)
            k = _fill(k, pad_k, (rows, cols), (side_h, side_w))
            v = _fill(v, pad_v, (rows, cols), (side_h, side_w))
        return biased_attention(q, k, v, rel_rows, rel_cols)

    def _padding(self, tokens: Tensor) -> Tensor:
        """Projection of a token of zeros, (3 * dim,): the bias, also where an adapter wraps it."""
        if isinstance(self.qkv, nn.Linear):
            return self.qkv.bias
        projected: Tensor = self.qkv(tokens.new_zeros(1, tokens.shape[-1]))
        return projected[0]


def _split(qkv: Tensor, rows: int, cols: int, heads: int) -> Tensor:
    """Cut (B, h, w, 3 * dim) into windows, (3, windows, heads, rows * cols, width)."""
    b, h, w, _ = qkv.shape
    grid = qkv.reshape(b, h // rows, rows, w // cols, cols, 3, heads, -1)
    windows = grid.permute(5, 0, 1, 3, 6, 2, 4, 7)
    return windows.reshape(3, -1, heads, rows * cols, grid.shape[-1])


def _join(windows: Tensor, shape: torch.Size, rows: int, cols: int) -> Tensor:
    """Lay (windows, heads, rows * cols, width) out as a map (B, h, w, dim)."""
    b, h, w, dim = shape
    grid = windows.transpose(1, 2).reshape(b, h // rows, w // cols, rows, cols, dim)
    return grid.transpose(2, 3).reshape(shape)


def _fill(
    tokens: Tensor, padding: Tensor, extent: tuple[int, int], sides: tuple[int, int]
) -> Tensor:
    """Extend windows of ``extent`` to ``sides`` tokens, at the bottom and right, by ``padding``.

    Tokens are (windows, heads, rows * cols, width), the padding is (heads, 1, 1, width).
    """
    full = padding.to(tokens.dtype).repeat(len(tokens), 1, *sides, 1)
    full[:, :, : extent[0], : extent[1]] = tokens.unflatten(2, extent)
    return full.flatten(2, 3)
