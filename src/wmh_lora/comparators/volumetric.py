"""The 3-D networks of MONAI: nnU-Net's architecture and UNETR; and their inference.

References
----------
F. Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image
segmentation", Nature Methods 18:203-211, 2021, doi:10.1038/s41592-020-01008-z.

A. Hatamizadeh et al., "UNETR: Transformers for 3D Medical Image Segmentation", WACV 2022,
arXiv:2103.10504.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wmh_lora.comparators.settings import DynUNetSettings, UnetrSettings
from wmh_lora.errors import ConfigError

__all__ = ["NetworkPlan", "build_dynunet", "build_unetr", "plan_network", "slide"]

FloatArray = npt.NDArray[np.float32]

_SMALLEST_MAP = 4  # pixels along an axis that is still halved to no less than this
_SIMILAR = 2.0  # spacings closer than this ratio count as equal

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class NetworkPlan:
    """Kernel and stride (slices, rows, columns) of each resolution, fine to coarse."""

    kernels: tuple[Triple, ...]
    strides: tuple[Triple, ...]


def plan_network(
    spacing_mm: Sequence[float], patch_px: Sequence[int], levels: int = 6
) -> NetworkPlan:
    """Choose kernels and strides for the spacing, by the rule of nnU-Net.

    An axis is halved as long as its spacing is below twice the smallest one and its map keeps four
    cells; kernels reach along an axis from the resolution on at which its spacing is similar to
    the others'. So thick slices are first seen one by one, and mixed when pixels have grown.

    Parameters
    ----------
    spacing_mm : three floats
        Distance of slices, rows and columns.
    patch_px : three ints
        Size of a patch along them.
    levels : int
        Most resolutions, at least 3.

    Raises
    ------
    ConfigError
        If a patch is too small for three resolutions.

    Examples
    --------
    >>> plan = plan_network((6.0, 1.0, 1.0), (16, 64, 64), levels=4)
    >>> plan.kernels
    ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    >>> plan.strides
    ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    size = np.asarray(patch_px, dtype=np.int64)
    reach = np.zeros(3, dtype=bool)
    kernels: list[Triple] = []
    strides: list[Triple] = []
    stride = np.ones(3, dtype=np.int64)
    while True:
        similar = spacing < _SIMILAR * spacing.min()
        reach |= similar  # a kernel that has reached along an axis keeps doing so
        kernels.append(_triple(np.where(reach, 3, 1)))
        strides.append(_triple(stride))
        large = (size % 2 == 0) & (size >= 2 * _SMALLEST_MAP)
        # an axis that is too small to be halved is no standard for the others
        closest = spacing[large].min() if large.any() else np.inf
        halved = large & (spacing < _SIMILAR * closest)
        if len(kernels) == levels or not halved.any():
            break
        stride = np.where(halved, 2, 1)
        spacing, size = spacing * stride, size // stride
    if len(kernels) < 3:
        raise ConfigError(
            f"A patch of {tuple(patch_px)} is too small for three resolutions; enlarge patch_px."
        )
    return NetworkPlan(tuple(kernels), tuple(strides))


def build_dynunet(settings: DynUNetSettings, plan: NetworkPlan) -> nn.Module:
    """Build MONAI's DynUNet: while training it returns (B, outputs, 1, D, H, W), else logits.

    The first output is the finest, the others are those of the supervised levels, upsampled.
    """
    levels = len(plan.strides)
    network: nn.Module = _monai_nets().DynUNet(
        spatial_dims=3,
        in_channels=2 if settings.t1 else 1,
        out_channels=1,
        kernel_size=plan.kernels,
        strides=plan.strides,
        upsample_kernel_size=plan.strides[1:],
        filters=settings.filters[:levels],
        deep_supervision=True,
        # MONAI takes fewer than there are steps up
        deep_supr_num=min(settings.supervised_levels, levels - 2),
    )
    return network


def build_unetr(settings: UnetrSettings) -> nn.Module:
    """Build MONAI's UNETR for patches of the settings' size."""
    from importlib.util import find_spec

    if find_spec("einops") is None:
        raise ConfigError("UNETR needs einops: pip install 'wmh-lora[train]'")
    network: nn.Module = _monai_nets().UNETR(
        in_channels=2 if settings.t1 else 1,
        out_channels=1,
        img_size=settings.patch_px,
        feature_size=settings.feature_size,
        hidden_size=settings.hidden_size,
        mlp_dim=settings.mlp_dim,
        num_heads=settings.num_heads,
    )
    return network


@torch.inference_mode()
def slide(
    networks: Sequence[nn.Module],
    channels: FloatArray,
    patch_px: Sequence[int],
    *,
    overlap: float,
    mirror: bool,
) -> FloatArray:
    """Compute the lesion probability of a whole scan by sliding windows.

    Logits of overlapping windows are averaged with Gaussian weights; probabilities are averaged
    over networks and, where asked for, the four flips of a slice.

    Parameters
    ----------
    networks : sequence of nn.Module
        In evaluation mode; map (B, C, D, H, W) to logits (B, 1, D, H, W).
    channels : array (C, S, H, W)
        The scan; padded with zeros where it is smaller than a patch.
    patch_px : three ints
        Window.
    overlap : float
        Share of a window that the next one shares.
    mirror : bool
        Average over flips of rows and columns.

    Returns
    -------
    array (S, H, W) float32 in [0, 1]
    """
    from monai.inferers.utils import sliding_window_inference

    device = next(networks[0].parameters()).device
    scan = torch.from_numpy(np.ascontiguousarray(channels))[None].to(device)
    flips: list[tuple[int, ...]] = [(), (-1,), (-2,), (-2, -1)] if mirror else [()]
    summed = torch.zeros(scan.shape[2:], device=device)
    for network in networks:
        for flip in flips:
            logits: Any = sliding_window_inference(
                scan.flip(flip), tuple(patch_px), 1, network, overlap=overlap, mode="gaussian"
            )
            assert isinstance(logits, Tensor)
            summed += torch.sigmoid(logits.flip(flip)[0, 0])
    probability: FloatArray = (summed / (len(networks) * len(flips))).cpu().numpy()
    return probability


def _triple(values: npt.NDArray[np.int64]) -> Triple:
    first, second, third = (int(value) for value in values)
    return first, second, third


def _monai_nets() -> Any:
    # takes seconds to import, and belongs to the train extra
    try:
        import monai.networks.nets
    except ImportError as error:
        raise ConfigError(
            "this method needs MONAI: pip install 'wmh-lora[train]', or leave it out of "
            "comparison.methods"
        ) from error
    return monai.networks.nets
