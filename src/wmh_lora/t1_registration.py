"""Bring a T1 to the place of its FLAIR, where the head has moved between the two scans.

Needs SimpleITK, which ``pip install 'wmh-lora[registration]'`` brings.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from wmh_lora.registration import rigid_movement, turn_and_shift
from wmh_lora.volume import Volume

__all__ = ["register_t1"]

_log = logging.getLogger("wmh_lora")


def register_t1(t1: Volume, flair: Volume) -> Volume:
    """Find the rigid movement between a T1 and its FLAIR, and correct the T1's header by it.

    As `wmh_lora.registration.rigid_movement` finds it. Voxels are not touched: only the affine of
    the result differs.

    Returns
    -------
    Volume
        The T1, in the place of the FLAIR.

    Raises
    ------
    ConfigError
        If SimpleITK is not installed.
    DataError
        If no head can be told from background, or the registration fails.
    """
    movement = rigid_movement(flair, t1)
    middle = flair.affine @ [*((np.array(flair.shape) - 1) / 2), 1.0]
    turn_deg, shift_mm = turn_and_shift(movement, middle[:3])
    _log.info("T1 moved by %.1f mm and turned by %.1f degrees onto the FLAIR", shift_mm, turn_deg)
    return replace(t1, affine=np.linalg.inv(movement) @ t1.affine)
