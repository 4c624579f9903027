"""The channel adapter: from FLAIR (and T1) slices to the three channels that an encoder expects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ChannelAdapter"]


class ChannelAdapter(nn.Module):
    """Hand the encoder the centre FLAIR slice, plus what a small learned branch adds to it.

    The branch is that of the WMH-LoRA description: Conv 3x3, BatchNorm, GELU, Conv 1x1. Its last
    convolution starts at zero, so the untrained adapter is exactly the identity on the centre
    slice, repeated in every channel, and the encoder starts from inputs it knows.

    T1 slices enter the branch through a convolution of their own, ``t1_stem``, whose output is
    added to that of the first one. Where T1 is missing, the learned ``t1_missing`` takes its
    place, so that one model serves FLAIR with T1 and FLAIR alone. Both start at zero: added to a
    model that was trained on FLAIR alone, they do not change what it computes.

    Parameters
    ----------
    in_channels : int
        FLAIR slices stacked as channels, an odd number, the slice to segment in the middle.
    width : int
        Hidden channels of the branch.
    out_channels : int
        Channels the encoder takes.
    t1_channels : int
        T1 slices stacked as channels; 0 for an adapter of FLAIR alone.

    Examples
    --------
    >>> adapter = ChannelAdapter(3)
    >>> slices = torch.rand(1, 3, 8, 8)
    >>> torch.equal(adapter(slices), slices[:, 1:2].expand(-1, 3, -1, -1))
    True
    """

    def __init__(
        self, in_channels: int, width: int = 16, out_channels: int = 3, t1_channels: int = 0
    ) -> None:
        super().__init__()
        if in_channels < 1 or in_channels % 2 == 0:
            raise ValueError(f"in_channels must be odd to have a centre, found {in_channels}.")
        self.centre = in_channels // 2
        self.out_channels = out_channels
        self.t1_channels = t1_channels
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
        if t1_channels:
            self.t1_stem = nn.Conv2d(t1_channels, width, 3, padding=1, bias=False)
            nn.init.zeros_(self.t1_stem.weight)
            self.t1_missing = nn.Parameter(torch.zeros(width))

    def forward(
        self, slices: Tensor, t1: Tensor | None = None, t1_present: Tensor | None = None
    ) -> Tensor:
        """Adapt the input of a batch.

        Parameters
        ----------
        slices : Tensor
            FLAIR, (B, in_channels, H, W) in [0, 1].
        t1 : Tensor, optional
            T1, (B, t1_channels, H, W) in [0, 1]; None if it is missing throughout.
        t1_present : Tensor, optional
            (B,) bool. What ``t1`` holds for the other samples (NaN, say) has no effect. By
            default T1 is there for all.

        Returns
        -------
        Tensor
            (B, out_channels, H, W). It is not clamped: the branch may leave [0, 1] where that
            serves the encoder.

        Raises
        ------
        ValueError
            If T1 is given to an adapter of FLAIR alone.
        """
        slices = slices.contiguous(memory_format=torch.channels_last)
        centre = slices[:, self.centre : self.centre + 1]
        first, *rest = self.branch
        hidden: Tensor = first(slices)
        if self.t1_channels:
            hidden = hidden + self._t1_update(t1, t1_present)
        elif t1 is not None:
            raise ValueError("T1 slices are given, but this adapter has t1_channels = 0.")
        for layer in rest:
            hidden = layer(hidden)
        return centre + hidden

    def _t1_update(self, t1: Tensor | None, present: Tensor | None) -> Tensor:
        """What T1, or its absence, adds to the hidden channels: (B or 1, width, H or 1, W or 1)."""
        missing = self.t1_missing[:, None, None]
        if t1 is None:
            return missing[None]
        t1 = t1.contiguous(memory_format=torch.channels_last)
        if present is None:
            update: Tensor = self.t1_stem(t1)
            return update
        present = present[:, None, None, None]
        # Zeros first: NaN times a zero gradient would still be NaN.
        return torch.where(present, self.t1_stem(torch.where(present, t1, 0.0)), missing)

    def fold_batch_norm(self) -> None:
        """Take over into the T1 parameters the gain of the BatchNorm that they are added before.

        For inference, when the BatchNorm is about to be folded into the branch's convolution.
        """
        norm = self.branch[1]
        if self.t1_channels and isinstance(norm, nn.BatchNorm2d):
            assert norm.running_var is not None
            with torch.no_grad():
                gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                self.t1_stem.weight.mul_(gain[:, None, None, None])
                self.t1_missing.mul_(gain)
