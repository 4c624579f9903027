"""The layers of TinyViT, with BatchNorm already folded into the convolutions.

Maps are (B, C, h, w), channels-last in memory, so that their tokens (B, h, w, C) are a view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionBlock", "ChannelNorm", "ConvBlock", "Merge", "PointwiseConv"]

EXPANSION = 4  # hidden / outer channels, in the convolution blocks and in the MLPs
STRIP_TOKENS = 8192  # of a strip in convolution blocks: 8 MB of float32 hidden features


class Attention(nn.Module):
    """Multi-head self-attention inside one window, biased by the relative position of tokens.

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
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        # One bias per head and absolute offset (|dy|, |dx|), offsets in raster order.
        self.attention_biases = nn.Parameter(torch.zeros(heads, window**2), requires_grad=False)
        y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
        index = (y[:, None] - y).abs() * window + (x[:, None] - x).abs()
        self.register_buffer("bias_index", index, persistent=False)
        self._cached_bias: tuple[tuple[object, ...], Tensor] | None = None

    def relative_bias(self) -> Tensor:
        """Bias of every pair of tokens, (1, heads, tokens, tokens); gathered once while frozen."""
        table = self.attention_biases
        if table.requires_grad:
            return table[:, self.bias_index][None]
        version = 0 if table.is_inference() else table._version
        key = (table.data_ptr(), version, table.device, table.dtype)
        if self._cached_bias is None or self._cached_bias[0] != key:
            # A tensor born in inference mode could not serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._cached_bias = (key, table[:, self.bias_index][None])
        return self._cached_bias[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend within windows: (windows, tokens, dim) -> the same shape."""
        n, length, dim = tokens.shape
        qkv: Tensor = self.qkv(self.norm(tokens))
        # The reference orders the projection head by head: (q, k, v) of head 0, then of head 1...
        q, k, v = qkv.view(n, length, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        mixed = _attend(q, k, v, self.relative_bias())
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, length, dim))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Biased scaled dot-product attention, (windows, heads, tokens, width) each."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel's backward pass is 3-6x slower than these products in bfloat16 there.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.to(q.dtype)
        mixed: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
        return mixed
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Mlp(nn.Module):
    """Pre-normalised two-layer perceptron on tokens of width ``dim``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, EXPANSION * dim)
        self.fc2 = nn.Linear(EXPANSION * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., dim) to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm(tokens))))
        return out


class AttentionBlock(nn.Module):
    """Windowed attention, a depthwise 3x3 convolution across windows, then an MLP."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(dim, heads, window)
        self.local_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = Mlp(dim)

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention in non-overlapping windows, (B, h, w, C) -> (B, h, w, C).

        The map is padded with zeros at the bottom and right to whole windows. As in the
        reference, padded tokens take part as keys and values (their normalised value is the
        bias of the normalisation layer); only their outputs are dropped.
        """
        b, h, w, c = tokens.shape
        side = self.window
        rows, cols = -(-h // side), -(-w // side)
        pad_h, pad_w = rows * side - h, cols * side - w
        if pad_h or pad_w:
            tokens = F.pad(tokens, (0, 0, 0, pad_w, 0, pad_h))
        windows = tokens.view(b, rows, side, cols, side, c).transpose(2, 3)
        out: Tensor = self.attn(windows.reshape(-1, side * side, c))
        out = out.view(b, rows, cols, side, side, c).transpose(2, 3)
        return out.reshape(b, rows * side, cols * side, c)[:, :h, :w]

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape, channels-last in and out."""
        tokens = features.permute(0, 2, 3, 1)
        tokens = tokens + self.attend(tokens)
        mixed: Tensor = self.local_conv(tokens.permute(0, 3, 1, 2))
        tokens = mixed.permute(0, 2, 3, 1)
        out: Tensor = tokens + self.mlp(tokens)
        return out.permute(0, 3, 1, 2)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution computed as a matrix product on channels-last tokens.

    With one thread, PyTorch's float32 CPU convolution takes a slow path that copies the map.
    """

    def __init__(self, dim: int, out_dim: int, bias: bool = True) -> None:
        super().__init__(dim, out_dim, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, dim, h, w) to (B, out_dim, h, w)."""
        tokens = F.linear(features.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return tokens.permute(0, 3, 1, 2)


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
        if torch.is_grad_enabled():
            return self._whole(features)
        # The hidden maps are 4 times the input at full resolution, larger than any cache: without
        # gradients to keep them for, work through strips of rows, each with a halo of one row.
        height, width = features.shape[2:]
        step = max(1, STRIP_TOKENS // width)
        out = torch.empty_like(features)
        for source, target in zip(features.split(1), out.split(1)):
            for top in range(0, height, step):
                bottom = min(top + step, height)
                first, last = max(top - 1, 0), min(bottom + 1, height)
                strip = self._whole(source[:, :, first:last])
                target[:, :, top:bottom] = strip[:, :, top - first : bottom - first]
        return out

    def _whole(self, features: Tensor) -> Tensor:
        hidden = F.gelu(self.conv1(features))
        hidden = F.gelu(self.conv2(hidden))
        return F.gelu(features + self.conv3(hidden))


class Merge(nn.Module):
    """Transition between stages: new channel count, resolution divided by ``stride``."""

    def __init__(self, dim: int, out_dim: int, stride: int) -> None:
        super().__init__()
        self.conv1 = PointwiseConv(dim, out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, stride=stride, padding=1, groups=out_dim)
        self.conv3 = PointwiseConv(out_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, dim, h, w) to (B, out_dim, h / stride, w / stride)."""
        out: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(features)))))
        return out


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of a (B, C, h, w) map."""

    def forward(self, features: Tensor) -> Tensor:
        """Normalise each position's channels."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
