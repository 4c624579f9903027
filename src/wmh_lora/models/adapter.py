"""The channel adapter: from FLAIR slices to the three channels a foundation encoder expects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelAdapter"]


class ChannelAdapter(nn.Module):
    """Hand the encoder the centre slice, plus what a small learned branch adds to it.

    The branch is that of the WMH-LoRA description: Conv 3x3, BatchNorm, GELU, Conv 1x1. Its last
    convolution starts at zero, so the untrained adapter is exactly the identity on the centre
    slice, repeated in every channel, and the encoder starts from inputs it knows.

    Parameters
    ----------
    in_channels : int
        Slices stacked as channels, an odd number, the slice to segment in the middle.
    width : int
        Hidden channels of the branch.
    out_channels : int
        Channels the encoder takes.

    Examples
    --------
    >>> adapter = ChannelAdapter(3)
    >>> slices = torch.rand(1, 3, 8, 8)
    >>> torch.equal(adapter(slices), slices[:, 1:2].expand(-1, 3, -1, -1))
    True
    """

    def __init__(self, in_channels: int, width: int = 16, out_channels: int = 3) -> None:
        super().__init__()
        if in_channels < 1 or in_channels % 2 == 0:
            raise ValueError(f"in_channels must be odd to have a centre, found {in_channels}.")
        self.centre = in_channels // 2
        self.out_channels = out_channels
        last = nn.Conv2d(width, out_channels, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]  # a bias is there by default
        self.branch = nn.Sequential(
            # BatchNorm supplies the bias.
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
            last,
        )

    def forward(self, slices: Tensor) -> Tensor:
        """Map slices (B, in_channels, H, W) in [0, 1] to (B, out_channels, H, W).

        The result is not clamped: the branch may leave [0, 1] where that serves the encoder.
        """
        slices = slices.contiguous(memory_format=torch.channels_last)
        centre = slices[:, self.centre : self.centre + 1]
        adapted: Tensor = centre + self.branch(slices)
        return adapted
