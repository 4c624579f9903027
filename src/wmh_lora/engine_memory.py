"""How many slices go through the network at once within a limit of memory.

What the process holds when the scan has been prepared is read from the system; what is to come is
counted from the scan's shape. Only what the network needs for a slice cannot be counted: it was
measured, as the growth of the peak with the batch in fresh processes (``python -m
benchmarks.inference --activations``).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from wmh_lora.engine_looks import Looks
from wmh_lora.errors import ConfigError
from wmh_lora.logs import LOGGER
from wmh_lora.preprocess import Prepared
from wmh_lora.sizes import format_size, parse_size

__all__ = ["ScanSize", "batch_within", "looks_within", "resident_bytes"]

# Bytes a pixel of a slice, float32; encoders that are not listed count as the hungriest.
_ACTIVATIONS = {"compact": 1200, "medsam-vit-b": 900, "sam-vit-b": 900}
_MOST_ACTIVATIONS = 4000
# What libraries set aside at their first use, whatever the size.
_OVERHEAD_BYTES = 48 * 2**20
# Of Python and torch, where the system does not tell.
_TYPICAL_PROCESS_BYTES = 400 * 2**20


@dataclass(frozen=True)
class ScanSize:
    """What counts for memory.

    Attributes
    ----------
    voxels : int
        Of the scan.
    slices, pixels : int
        Slices on the network's grid, and pixels of each.
    turned_pixels : int
        Of a slice of the other planes, the larger of the two.
    views : int
        In which a slice is seen.
    looks : Looks
        At the scan.
    """

    voxels: int
    slices: int
    pixels: int
    turned_pixels: int
    views: int
    looks: Looks

    @classmethod
    def of(cls, prepared: Prepared, views: int, looks: Looks) -> ScanSize:
        """Take the sizes of a prepared scan."""
        slices, height, width = prepared.slices.shape
        voxels = math.prod(prepared.view.shape_native)
        depth = round(slices * prepared.view.spacing_mm[0] / prepared.config.pixel_size_mm)
        return cls(voxels, slices, height * width, depth * max(height, width), views, looks)

    @property
    def largest_pixels(self) -> int:
        """Pixels of a slice in the look that shows it largest."""
        turned = self.turned_pixels if self.looks.planes > 1 else 0
        return max(math.ceil(self.looks.zoom**2 * self.pixels), turned)

    @property
    def grid_bytes(self) -> int:
        """Maps on the network's grid: probability, two structures in a byte each, deviation.

        Of several looks, also three sums, the turned or larger slices and what was found in them.
        """
        a_pixel = 6.0 if self.views == 1 else 10.0
        if self.looks.count > 1:
            a_pixel += 20.0 + 20.0 * self.looks.zoom**2
        return math.ceil(a_pixel * self.slices * self.pixels)

    @property
    def native_bytes(self) -> int:
        """Maps on the scan's grid, three masks among them, and room for comparisons."""
        return (9 if self.views * self.looks.count == 1 else 13) * self.voxels


def batch_within(max_memory: str, scan: ScanSize, encoder: str, wanted: int) -> int:
    """Return the largest batch up to ``wanted`` whose peak stays within a limit.

    Parameters
    ----------
    max_memory : str
        See `wmh_lora.sizes.parse_size`.
    scan : ScanSize
        The scan, which has been read and prepared.
    encoder : str
        Name of the network's encoder.
    wanted : int
        Slices at once without a limit.

    Raises
    ------
    ConfigError
        If one slice at a time is too much; the message says what would do.
    """
    resident = resident_bytes()
    per_slice = _ACTIVATIONS.get(encoder, _MOST_ACTIVATIONS) * scan.largest_pixels
    held = resident + _OVERHEAD_BYTES + scan.grid_bytes
    # what the network needed is free again when results are brought to the scan's grid
    free = parse_size(max_memory) - held
    batch = min(wanted, free // per_slice)
    if batch < 1 or free < scan.native_bytes:
        least = held + max(per_slice, scan.native_bytes)
        raise ConfigError(
            f"The scan cannot be segmented within {max_memory} of memory; it takes "
            f"{format_size(least)} with one slice at a time. Allow that much"
            + (", or leave out test-time augmentation." if scan.views > 1 else ".")
        )
    return batch


def looks_within(max_memory: str, scan: ScanSize, encoder: str, wanted: int) -> tuple[Looks, int]:
    """Return in which looks a scan can be seen within a limit, and the batch for them.

    Where there is no room for all looks there may be for one, which is said in a warning.

    Parameters
    ----------
    max_memory, scan, encoder, wanted
        See `batch_within`.

    Raises
    ------
    ConfigError
        If one slice of one look at a time is too much.
    """
    try:
        return scan.looks, batch_within(max_memory, scan, encoder, wanted)
    except ConfigError:
        if scan.looks.count == 1:
            raise
    once = Looks()
    batch = batch_within(max_memory, replace(scan, looks=once), encoder, wanted)
    LOGGER.warning(
        "Memory of %s has no room for %d looks; the scan gets one, in one plane.",
        max_memory,
        scan.looks.count,
    )
    return once, batch


def resident_bytes() -> int:
    """Return the memory that this process holds now; its peak so far where that is not told."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    if sys.platform == "win32":
        return _TYPICAL_PROCESS_BYTES
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
