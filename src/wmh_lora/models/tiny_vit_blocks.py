"""The layers of TinyViT, with BatchNorm already folded into the convolutions.

Maps are (B, C, h, w), channels-last in memory, so that their tokens (B, h, w, C) are a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.models.linear import Linear, PointwiseConv, is_traced, layer_gelu, layer_sum
from wmh_lora.models.windows import WindowGroup, window_order

__all__ = ["AttentionBlock", "ChannelNorm", "ConvBlock", "Merge", "PointwiseConv"]

EXPANSION = 4  # hidden / outer channels, in the convolution blocks and in the MLPs
STRIP_TOKENS = 4096  # of a strip in convolution blocks: 4 MB of float32 hidden features


class Attention(nn.Module):
    """Multi-head self-attention inside windows, biased by the relative position of tokens.

    The published model pads maps with zeros to whole windows *after* which it normalises: padded
    tokens take part as keys and values, each the projection of the normalisation's bias, and their
    own results are dropped. Here they are not computed. They share one key and one value, so that
    all of a window's padding acts as one more key, whose bias is the logarithm of the sum of the
    exponentials of their biases.

    Parameters
    ----------
    dim : int
        Token width.
    heads : int
        Number of heads, each of width ``dim // heads``.
    window : int
        Window side in tokens.
    """

    bias_index: Tensor

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.norm = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        # One bias per head and absolute offset (|dy|, |dx|), offsets in raster order.
        self.attention_biases = nn.Parameter(torch.zeros(heads, window**2), requires_grad=False)
        y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
        index = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("bias_index", index, persistent=False)
        self._cached_biases: tuple[object, dict[tuple[int, int], Tensor]] = (None, {})

    def relative_bias(self, rows: int, cols: int) -> Tensor:
        """Biases inside windows of ``rows`` x ``cols`` real tokens; gathered once while frozen.

        Returns
        -------
        Tensor
            (1, heads, tokens, keys): the keys are the real tokens and, in windows that are not
            whole, one for all padding.
        """
        table = self.attention_biases
        if table.requires_grad or is_traced():
            return self._gather_bias(rows, cols)
        version = 0 if table.is_inference() else table._version
        key = (table.data_ptr(), version, table.device, table.dtype)
        if self._cached_biases[0] != key:
            self._cached_biases = (key, {})
        biases = self._cached_biases[1]
        if (rows, cols) not in biases:
            # A tensor born in inference mode could not serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                biases[rows, cols] = self._gather_bias(rows, cols)
        return biases[rows, cols]

    def _gather_bias(self, rows: int, cols: int) -> Tensor:
        side, index = self.window, self.bias_index
        if rows == cols == side:
            return self.attention_biases[:, index][None]
        real = torch.zeros(side, side, dtype=torch.bool, device=index.device)
        real[:rows, :cols] = True
        real = real.flatten()
        index = index[real]
        padding = self.attention_biases[:, index[:, ~real]].logsumexp(dim=-1, keepdim=True)
        return torch.cat((self.attention_biases[:, index[:, real]], padding), dim=-1)[None]

    def forward(self, tokens: Tensor, groups: Sequence[WindowGroup]) -> Tensor:
        """Add what attention finds: (tokens, dim) in window order -> the same shape."""
        side = self.window
        qkv: Tensor = self.qkv(self.norm(tokens))
        padding: Tensor | None = None
        mixed = []
        for start, stop, rows, cols in groups:
            # The published projection goes head by head: (q, k, v) of head 0, then of head 1...
            parts = qkv[start:stop].view(
                -1, rows * cols, self.heads, 3, qkv.shape[1] // 3 // self.heads
            )
            q, k, v = parts.transpose(1, 2).unbind(dim=3)
            if rows < side or cols < side:
                if padding is None:
                    padding = self.qkv(self.norm.bias[None])
                k, v = self._with_padding(k, v, padding)
            out = _attend(q, k, v, self.relative_bias(rows, cols))
            mixed.append(out.transpose(1, 2).reshape(-1, tokens.shape[1]))
        return layer_sum(self.proj, mixed[0] if len(mixed) == 1 else torch.cat(mixed), tokens)

    def _with_padding(self, k: Tensor, v: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        """Append the projection (1, 3 * dim) of a padded token to keys and values."""
        _, pad_k, pad_v = (
            padding.view(1, self.heads, 1, 3, -1).expand(len(k), -1, -1, -1, -1).unbind(3)
        )
        return torch.cat((k, pad_k), dim=2), torch.cat((v, pad_v), dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Biased scaled dot-product attention, (windows, heads, tokens, width) each."""
    bias = bias.to(q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        # The fused kernel's backward pass is 3-6x slower than these products in bfloat16 there.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        mixed: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
        return mixed
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Mlp(nn.Module):
    """Pre-normalised two-layer perceptron on tokens of width ``dim``, added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = Linear(dim, EXPANSION * dim)
        self.fc2 = Linear(EXPANSION * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., dim) to the same shape."""
        return layer_sum(self.fc2, layer_gelu(self.fc1, self.norm(tokens)), tokens)


class AttentionBlock(nn.Module):
    """Windowed attention, a depthwise 3x3 convolution across windows, then an MLP."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(dim, heads, window)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = Mlp(dim)

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention in non-overlapping windows, added: (B, h, w, C) -> (B, h, w, C)."""
        if is_traced():
            return self._attend_padded(tokens)
        b, h, w, c = tokens.shape
        order = window_order(b, h, w, self.window, tokens.device)
        ordered = self.attn(tokens.reshape(-1, c).index_select(0, order.order), order.groups)
        out: Tensor = ordered.index_select(0, order.inverse).view(b, h, w, c)
        return out

    def _attend_padded(self, tokens: Tensor) -> Tensor:
        """Compute the same as `attend` with padding to whole windows, as published.

        A graph of it holds no table of places, which would tie it to one size of the map.
        """
        b, h, w, c = tokens.shape
        side = self.window
        rows, cols = -(-h // side), -(-w // side)
        padded = F.pad(tokens, (0, 0, 0, cols * side - w, 0, rows * side - h))
        windows = padded.view(b, rows, side, cols, side, c).transpose(2, 3).reshape(-1, c)
        out: Tensor = self.attn(windows, [WindowGroup(0, len(windows), side, side)])
        out = out.view(b, rows, cols, side, side, c).transpose(2, 3)
        return out.reshape(b, rows * side, cols * side, c)[:, :h, :w]

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape, channels-last in and out."""
        tokens = self.attend(features.permute(0, 2, 3, 1))
        mixed: Tensor = self.local_conv(tokens.permute(0, 3, 1, 2))
        out: Tensor = self.mlp(mixed.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """Inverted residual (MBConv): expand 1x1, depthwise 3x3, project 1x1, add, activate."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = EXPANSION * dim
        self.conv1 = PointwiseConv(dim, hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv3 = PointwiseConv(hidden, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        return _in_strips(self._rows, features, self.conv3.out_channels)

    def _rows(self, features: Tensor, inner: slice) -> Tensor:
        hidden = layer_gelu(self.conv2, layer_gelu(self.conv1, features))
        return F.gelu(layer_sum(self.conv3, hidden[:, :, inner], features[:, :, inner]))


class Merge(nn.Module):
    """Transition between stages: new channel count, resolution divided by ``stride``."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = PointwiseConv(dim, out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, stride=stride, padding=1, groups=out_dim)
        self.conv3 = PointwiseConv(out_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, dim, h, w) to (B, out_dim, h / stride, w / stride)."""
        return _in_strips(self._rows, features, self.conv3.out_channels, self.stride)

    def _rows(self, features: Tensor, inner: slice) -> Tensor:
        hidden = layer_gelu(self.conv2, layer_gelu(self.conv1, features))
        out: Tensor = self.conv3(hidden[:, :, inner])
        return out.to(features.dtype)


def _in_strips(
    rows: Callable[[Tensor, slice], Tensor], features: Tensor, out_channels: int, stride: int = 1
) -> Tensor:
    """Run layers with one 3x3 convolution among them on strips of the map.

    Hidden maps at full resolution are larger than any cache. Without gradients to keep them for,
    this works through strips of rows, each with a halo of one row of the result.

    Parameters
    ----------
    rows : callable
        Maps (1, C, h, w) to the given ones of the h / stride rows of the result.
    features : Tensor
        (B, C, h, w).
    out_channels, stride : int
        The result is (B, out_channels, h / stride, w / stride).
    """
    height, width = (n // stride for n in features.shape[2:])
    if torch.is_grad_enabled() or is_traced():
        return rows(features, slice(0, height))
    size = (len(features), out_channels, height, width)
    out = torch.empty(
        size, dtype=features.dtype, device=features.device, memory_format=torch.channels_last
    )
    step = max(1, STRIP_TOKENS // (stride**2 * width))
    for source, target in zip(features.split(1), out.split(1)):
        for top in range(0, height, step):
            bottom = min(top + step, height)
            first, last = max(top - 1, 0), min(bottom + 1, height)
            part = source[:, :, first * stride : last * stride]
            target[:, :, top:bottom] = rows(part, slice(top - first, bottom - first))
    return out


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a (B, C, h, w) map."""

    def forward(self, features: Tensor) -> Tensor:
        """Normalise each position's channels."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
