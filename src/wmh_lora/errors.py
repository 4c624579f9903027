"""Every exception that the library raises on purpose.

The tree lets a caller choose how finely to catch: ``except WMHError`` for anything that has a clear
cause outside the code, or one branch of it::

    WMHError
    ├── ConfigError
    ├── DataError
    │   ├── GridMismatchError
    │   └── UnreadableImageError
    ├── WeightsError
    │   ├── ChecksumError
    │   └── AdapterMismatchError
    └── DeviceError

A message is one clear sentence or two: what went wrong, in which file, what was expected and what
was found, and what to do next. The library raises; only the command line catches and prints.
"""

from __future__ import annotations

__all__ = [
    "AdapterMismatchError",
    "ChecksumError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "GridMismatchError",
    "UnreadableImageError",
    "WMHError",
    "WeightsError",
]


class WMHError(Exception):
    """Root of all errors with a known cause; never raised itself."""


class ConfigError(WMHError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class DataError(WMHError):
    """An input cannot be used, or an output cannot be written."""


class GridMismatchError(DataError):
    """Two images that must share one voxel grid do not."""


class UnreadableImageError(DataError):
    """A file is absent, damaged, or holds no 3-D scalar image that can be segmented."""


class WeightsError(WMHError):
    """Model weights are absent, or do not fit the network."""


class ChecksumError(WeightsError):
    """A weights file differs from the published one."""


class AdapterMismatchError(WeightsError):
    """A trained model was made for another base encoder or another layout."""


class DeviceError(WMHError):
    """The requested device is absent, or ran out of memory."""
