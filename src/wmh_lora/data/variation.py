"""The published variation of slices, by MONAI's transforms: geometry, then intensity.

Rotation of up to 15 degrees, scale within 10 %, flips, quarter turns; gamma, brightness, contrast
and Gaussian noise. The description gives no more numbers: the probabilities, and the strengths of
the changes of intensity, are this project's.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from wmh_lora.data.fields import FloatArray
from wmh_lora.errors import ConfigError

__all__ = ["vary_geometry", "vary_intensity"]

BoolArray = npt.NDArray[np.bool_]


def vary_geometry(
    seed: int, image: FloatArray, target: FloatArray, ignored: BoolArray
) -> tuple[FloatArray, FloatArray, BoolArray]:
    """Turn, scale and mirror a slice with its labels.

    Parameters
    ----------
    seed
        Fixes everything that is drawn.
    image
        (C, H, W), interpolated linearly; zero comes in from outside.
    target
        (n, H, W), fractions: interpolated linearly.
    ignored
        (1, H, W): the nearest pixel's value.

    Returns
    -------
    image, target, ignored
        As given, with H and W exchanged after an odd number of quarter turns.
    """
    planes = {"image": image, "target": target, "ignored": ignored.astype(np.float32)}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(p)) for name, p in planes.items()}
    varied = _geometry().set_random_state(seed)(tensors)
    picture, labels, left_out = (np.asarray(varied[name], np.float32) for name in planes)
    return picture, labels, left_out > 0.5


def vary_intensity(seed: int, image: FloatArray) -> FloatArray:
    """Change gamma, brightness and contrast of (C, H, W), add noise, and keep to [0, 1]."""
    varied = _intensity().set_random_state(seed)(torch.from_numpy(np.ascontiguousarray(image)))
    return np.clip(np.asarray(varied, np.float32), 0.0, 1.0)


@functools.cache
def _geometry() -> Any:
    transforms = _monai()
    keys, modes = ("image", "target", "ignored"), ("bilinear", "bilinear", "nearest")
    return transforms.Compose(
        [
            transforms.RandAffined(
                keys,
                prob=0.8,
                rotate_range=math.radians(15.0),
                scale_range=(0.1, 0.1),
                mode=modes,
                padding_mode="zeros",
            ),
            transforms.RandFlipd(keys, prob=0.5, spatial_axis=0),
            transforms.RandFlipd(keys, prob=0.5, spatial_axis=1),
            transforms.RandRotate90d(keys, prob=0.5, max_k=3),
        ]
    )


@functools.cache
def _intensity() -> Any:
    transforms = _monai()
    return transforms.Compose(
        [
            transforms.RandAdjustContrast(prob=0.3, gamma=(0.7, 1.5)),
            # A factor, so that the background stays at the zero that it always has.
            transforms.RandScaleIntensity(prob=0.3, factors=0.15),
            transforms.RandScaleIntensityFixedMean(
                prob=0.3, factors=0.15, fixed_mean=True, preserve_range=False
            ),
            transforms.RandGaussianNoise(prob=0.3, std=0.03),
        ]
    )


def _monai() -> Any:
    # takes seconds to import, and belongs to the train extra
    try:
        import monai.transforms
    except ImportError as error:
        raise ConfigError(
            "training on a manifest needs MONAI: pip install 'wmh-lora[train]'"
        ) from error
    return monai.transforms
