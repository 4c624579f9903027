"""The network as one graph of public operations, whose picture size stays a variable.

Exported files are made from a trace. Two things in the network would not survive one:

* Without gradients, several layers choose operations and cut maps into pieces by the size of the
  picture, for speed. With gradients enabled they take the plain way, which is the one traced.
* Windowed attention decides by the size whether, and where, a window reaches beyond the map. The
  forms below always pad, by nothing if need be, which gives the same values at every size.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmh_lora.models.network import WMHNet
from wmh_lora.models.sam_vit_attention import Attention as SamAttention
from wmh_lora.models.sam_vit_attention import relative_positions
from wmh_lora.models.tiny_vit_blocks import AttentionBlock

__all__ = ["example_slices", "trace_network", "traceable", "tracing"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_EXAMPLE_MULTIPLES = (6, 5)  # height and width of the traced example, in the least size


class _TinyBlock(nn.Module):
    """TinyViT's block of attention, convolution and MLP; shares the parameters of ``block``."""

    bias: Tensor

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        self.window = block.window
        self.heads = block.attn.heads
        self.norm, self.qkv, self.proj = block.attn.norm, block.attn.qkv, block.attn.proj
        self.local_conv = block.local_conv
        self.mlp = nn.Sequential(block.mlp.norm, block.mlp.fc1, nn.GELU(), block.mlp.fc2)
        bias = block.attn.attention_biases[:, block.attn.bias_index][None]
        self.register_buffer("bias", bias.detach())

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        tokens = features.permute(0, 2, 3, 1)
        windows = _to_windows(tokens, self.window)
        count, length, dim = windows.shape
        qkv = self.qkv(self.norm(windows)).view(count, length, self.heads, -1).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        mixed = self.proj(mixed.transpose(1, 2).reshape(count, length, dim))
        tokens = tokens + _from_windows(mixed, tokens, self.window)
        tokens = self.local_conv(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = tokens + self.mlp(tokens)
        return out.permute(0, 3, 1, 2)


class _SamAttention(nn.Module):
    """SAM's attention with all scores at once; shares the parameters of ``attention``."""

    def __init__(self, attention: SamAttention) -> None:
        super().__init__()
        self.window, self.heads = attention.window, attention.heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.rel_pos_h, self.rel_pos_w = attention.rel_pos_h, attention.rel_pos_w

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend, (B, h, w, dim) -> (B, h, w, dim)."""
        b, h, w, dim = tokens.shape
        rows, cols = self.window or h, self.window or w
        windows = _to_windows(tokens, self.window) if self.window else tokens.flatten(1, 2)
        qkv = self.qkv(windows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        by_place = q.unflatten(2, (rows, cols))
        rel_h = relative_positions(self.rel_pos_h, rows)
        rel_w = relative_positions(self.rel_pos_w, cols)
        of_rows = torch.einsum("nhrcd,rkd->nhrck", by_place, rel_h).flatten(2, 3)
        of_cols = torch.einsum("nhrcd,ckd->nhrck", by_place, rel_w).flatten(2, 3)
        bias = (of_rows.unsqueeze(-1) + of_cols.unsqueeze(-2)).flatten(-2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        attended = self.proj(mixed.transpose(1, 2).flatten(2))
        if self.window:
            return _from_windows(attended, tokens, self.window)
        out: Tensor = attended.reshape(b, h, w, dim)
        return out


def _to_windows(tokens: Tensor, side: int) -> Tensor:
    """Cut (B, h, w, C), padded with zeros to whole windows, into (windows, side * side, C)."""
    b, h, w, c = tokens.shape
    # Runtimes round a negative quotient towards zero, so the count is not -(-h // side).
    rows, cols = (h + side - 1) // side, (w + side - 1) // side
    tokens = F.pad(tokens, (0, 0, 0, cols * side - w, 0, rows * side - h))
    grid = tokens.view(b, rows, side, cols, side, c).transpose(2, 3)
    return grid.reshape(-1, side * side, c)


def _from_windows(windows: Tensor, tokens: Tensor, side: int) -> Tensor:
    """Lay windows out as the map ``tokens`` (B, h, w, C) that they were cut from."""
    b, h, w, c = tokens.shape
    rows, cols = (h + side - 1) // side, (w + side - 1) // side
    grid = windows.view(b, rows, cols, side, side, c).transpose(2, 3)
    return grid.reshape(b, rows * side, cols * side, c)[:, :h, :w]


def traceable(net: ModuleT) -> ModuleT:
    """Copy a network and give the copy's windowed attention a form that holds at every size.

    Parameters
    ----------
    net : nn.Module
        A network as loaded for inference, or a part of one; it stays as it is.
    """
    plain = copy.deepcopy(net)
    for module in list(plain.modules()):
        for name, child in module.named_children():
            if isinstance(child, AttentionBlock):
                setattr(module, name, _TinyBlock(child))
            elif isinstance(child, SamAttention):
                setattr(module, name, _SamAttention(child))
    return plain.eval()


def trace_network(net: WMHNet, in_channels: int) -> torch.jit.ScriptModule:
    """Trace a network, (B, C, H, W) -> logits, for any batch and any size that it takes.

    Parameters
    ----------
    net : WMHNet
        As loaded for inference, on the CPU.
    in_channels : int
        C.
    """
    example = example_slices(net, in_channels)
    with tracing():
        traced = torch.jit.trace(traceable(net), example, check_trace=False)
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced


def example_slices(net: WMHNet, in_channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """Slices to trace with, two of the given size or of a small one."""
    height, width = size or (net.size_multiple * count for count in _EXAMPLE_MULTIPLES)
    return torch.zeros(2, in_channels, height, width)


@contextmanager
def tracing() -> Iterator[None]:
    """Everything is computed in the plain way, and PyTorch's remarks on tracing pass.

    That the checks of a picture's size become constants is meant; that tracing is deprecated in
    favour of torch.export is known, but torch.export would fix whether windows need padding.
    """
    with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings(
            "ignore", module=r"torch\.(jit|onnx)\.", category=DeprecationWarning
        )
        warnings.filterwarnings("ignore", r".*(torch\.jit\.|TorchScript)", DeprecationWarning)
        yield
