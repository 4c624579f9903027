"""The 2-D U-Net with which the WMH Segmentation Challenge of 2017 was won.

Two convolutions a level, the first two of them 5 x 5, channels 64-96-128-256-512, doubling by
repetition of pixels on the way up, as in Li et al., "Fully convolutional network ensembles for
white matter hyperintensities segmentation in MR images", NeuroImage 183:650-665, 2018,
doi:10.1016/j.neuroimage.2018.07.005. It sees one FLAIR slice at a time.

BatchNorm is added, which the original lacks: with a Dice loss alone, it often begins by finding
nothing anywhere, and was then begun again. One 4 x 4 kernel of the original is 3 x 3 here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet2d"]


class UNet2d(nn.Module):
    """Segment one slice.

    Parameters
    ----------
    channels : sequence of int
        Of each level, fine to coarse.
    first_kernel : int
        Side of the kernels of the first level on the way down, odd.
    batch_norm : bool
        Normalise after each convolution but the last.

    Examples
    --------
    >>> net = UNet2d((4, 6, 8))
    >>> net.size_multiple
    4
    >>> net(torch.zeros(2, 3, 16, 24)).shape
    torch.Size([2, 1, 16, 24])
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 96, 128, 256, 512),
        first_kernel: int = 5,
        *,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.size_multiple = 2 ** (len(channels) - 1)
        widths = (1, *channels)
        self.down = nn.ModuleList(
            _level(before, after, 3 if level else first_kernel, batch_norm)
            for level, (before, after) in enumerate(zip(widths, channels))
        )
        self.up = nn.ModuleList(
            _level(fine + coarse, fine, 3, batch_norm)
            for fine, coarse in zip(channels[-2::-1], channels[:0:-1])
        )
        self.head = nn.Conv2d(channels[0], 1, 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, slices: Tensor) -> Tensor:
        """Compute logits.

        Parameters
        ----------
        slices : Tensor
            (B, C, H, W) in [0, 1], the slice to segment in the middle of C, which alone is looked
            at; H and W multiples of `size_multiple`.

        Returns
        -------
        Tensor
            (B, 1, H, W) logits.
        """
        centre = slices.shape[1] // 2
        features = slices[:, centre : centre + 1].contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for level in self.down:
            features = level(F.max_pool2d(features, 2) if skips else features)
            skips.append(features)
        for level, skip in zip(self.up, skips[-2::-1]):
            features = level(torch.cat([F.interpolate(features, scale_factor=2.0), skip], dim=1))
        logits: Tensor = self.head(features)
        return logits


def _level(before: int, after: int, kernel: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (before, after):
        layers.append(nn.Conv2d(width, after, kernel, padding=kernel // 2, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(after))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
