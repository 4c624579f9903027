"""What the reports of one scan need to know of its segmentation.

`wmh_lora.report.outputs.Segmentation` is one. The reports name this protocol instead, because that
class writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wmh_lora.volume import Volume

__all__ = ["Reported", "Segmented"]


class Segmented(Protocol):
    """A scan and what was found in it; see `wmh_lora.report.outputs.Segmentation`."""

    @property
    def volume(self) -> Volume:
        """The scan."""

    @property
    def probability(self) -> NDArray[np.float32]:
        """Probability of lesion, (I, J, K), in [0, 1]."""

    @property
    def mask(self) -> NDArray[np.uint8]:
        """1 lesion, 0 background, (I, J, K)."""

    @property
    def structure_masks(self) -> Mapping[str, NDArray[np.uint8]]:
        """Other structures by name, (I, J, K); may be empty."""

    @property
    def uncertainty(self) -> NDArray[np.float32] | None:
        """Standard deviation of the probability over views and looks, (I, J, K)."""

    def picture(self) -> Any:
        """Draw the montage, a `PIL.Image.Image`."""


class Reported(Segmented, Protocol):
    """A segmented scan that says how it was made, and reports itself."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Threshold, smallest lesion, views and more, as used."""

    @property
    def model(self) -> Mapping[str, Any]:
        """What identifies the model."""

    @property
    def t1_path(self) -> Path | None:
        """File of the T1 that was shown beside the FLAIR."""

    def report(self) -> dict[str, Any]:
        """Return the content of ``<stem>_wmh.json``."""
