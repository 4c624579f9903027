"""What the slice viewer of a report needs: the scan and its maps as small files, and its program.

The viewer is NiiVue (BSD-2-Clause), one script that a report carries in itself, see
``tools/build_viewer.py``. Layers are NIfTI of 8 bits a voxel, cropped to the head and packed, so
that a report stays a few megabytes and can be sent to a colleague as it is.
"""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray

from wmh_lora.report.montage import frame_head
from wmh_lora.report.segmented import Segmented
from wmh_lora.view import View, choose_view

__all__ = ["Layer", "ViewerProgram", "ViewerScene", "viewer_program", "viewer_scene"]

MAX_VOXELS = 12_000_000
"""Of a layer; scans with more are shown in coarser steps, or their report could not be opened."""

UNCERTAINTY_MAX = 0.5
"""Standard deviation that numbers in [0, 1] cannot exceed."""

_HEAD_PERCENTILE = 99.5  # brighter voxels are fat under the skin, shown white
_SAMPLE = 200_000  # voxels are enough to find it
_PACKING = 5  # of gzip, 1 to 9: what follows costs twice the time for one per cent
_PLANES = {0: "sagittal", 1: "coronal", 2: "axial"}


@dataclass(frozen=True)
class Layer:
    """One map as the viewer loads it.

    Attributes
    ----------
    name : str
        ``flair``, ``mask``, ``probability``, ``uncertainty`` or ``ventricles``.
    nifti : str
        A NIfTI file, gzipped, in base64.
    low, high : float
        Values of its first and last step: of 256, or of the two of a mask.
    """

    name: str
    nifti: str
    low: float
    high: float


@dataclass(frozen=True)
class ViewerScene:
    """Everything that the viewer shows of one scan.

    Attributes
    ----------
    layers : tuple of Layer
        The scan first.
    window : two floats
        Intensities shown as black and as white at first.
    plane : str
        ``axial``, ``coronal`` or ``sagittal``: that of the finest detail.
    steps : tuple of three ints
        Voxels of the scan along each axis that one voxel of the layers stands for.
    """

    layers: tuple[Layer, ...]
    window: tuple[float, float]
    plane: str
    steps: tuple[int, int, int]


@dataclass(frozen=True)
class ViewerProgram:
    """The viewer's script, and where it is from.

    Attributes
    ----------
    script : str
        JavaScript, gzipped, in base64.
    source_hash : str
        Of the unpacked script, as a content security policy names it: ``sha256-`` and base64.
    name, version, licence, sha256 : str
        As ``tools/build_viewer.py`` recorded them.
    notices : str
        Copyright and licence texts, which have to go wherever the script goes.
    """

    script: str
    source_hash: str
    name: str
    version: str
    licence: str
    sha256: str
    notices: str


@cache
def viewer_program() -> ViewerProgram:
    """Read the packaged viewer."""
    folder = resources.files("wmh_lora") / "assets" / "viewer"
    record = json.loads((folder / "niivue.json").read_text(encoding="utf-8"))
    digest = base64.b64encode(bytes.fromhex(record["sha256"])).decode("ascii")
    return ViewerProgram(
        script=base64.b64encode((folder / "niivue.umd.js.gz").read_bytes()).decode("ascii"),
        source_hash=f"sha256-{digest}",
        name=record["name"],
        version=record["version"],
        licence=record["licence"],
        sha256=record["sha256"],
        notices=(folder / "NOTICES.txt").read_text(encoding="utf-8"),
    )


def viewer_scene(segmentation: Segmented) -> ViewerScene:
    """Pack the scan, its mask, its probability and, where it is known, its uncertainty.

    The head is cut out, with every lesion. Intensities keep 256 steps between the black of the
    first window and the 99.5th percentile of the head, or the brightest lesion voxel, which lose
    the brightest fat and vessels only; the header scales them back to the scan's own units.

    Parameters
    ----------
    segmentation : Segmented
        On the scan's grid.
    """
    volume = segmentation.volume
    view = choose_view(volume, 1.0)
    scan = volume.finite_data()
    box, window, highest = _head(view, scan, segmentation.mask)
    maps: list[tuple[str, NDArray[Any], float, float]] = [
        ("flair", scan, window[0], highest),
        ("mask", segmentation.mask, 0.0, 1.0),
        ("probability", segmentation.probability, 0.0, 1.0),
    ]
    if segmentation.uncertainty is not None:
        maps.append(("uncertainty", segmentation.uncertainty, 0.0, UNCERTAINTY_MAX))
    if "ventricles" in segmentation.structure_masks:
        maps.append(("ventricles", segmentation.structure_masks["ventricles"], 0.0, 1.0))
    steps = _steps(scan[box].shape, volume.spacing_mm)
    affine = _affine(volume.affine, box, steps)
    return ViewerScene(
        layers=tuple(
            Layer(name, _pack(_part(data, box, steps), affine, first, last), first, last)
            for name, data, first, last in maps
        ),
        window=window,
        plane=_PLANES[int(io_orientation(volume.affine)[view.axes[0], 0])],
        steps=steps,
    )


def _head(
    view: View, scan: NDArray[np.float32], mask: NDArray[np.uint8]
) -> tuple[tuple[slice, slice, slice], tuple[float, float], float]:
    """Frame the head and every lesion; return also the first window and the highest intensity."""
    frame = frame_head(view.to_view(scan), view.to_view(mask) != 0)
    highest = frame.window[1]
    step = max(1, round((frame.tissue.size / _SAMPLE) ** (1 / 3)))
    thinned = (slice(None, None, step),) * 3
    sample = view.to_view(scan)[thinned][frame.tissue[thinned]]
    if sample.size:
        highest = max(highest, float(np.percentile(sample, _HEAD_PERCENTILE)))
    lesions = scan[mask != 0]  # without a skull they are the brightest
    if lesions.size:
        highest = max(highest, float(lesions.max()))
    return _native_box(view, frame.rows, frame.columns), frame.window, highest


def _native_box(view: View, rows: slice, columns: slice) -> tuple[slice, slice, slice]:
    """Turn a window of the view into one of the scan's own axes; all slices are kept."""
    box = [slice(0, n) for n in view.shape_native]
    for shown, kept in ((1, rows), (2, columns)):
        axis, count = view.axes[shown], view.shape[shown]
        flipped = view.flips[shown]
        box[axis] = slice(count - kept.stop, count - kept.start) if flipped else kept
    return box[0], box[1], box[2]


def _steps(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> tuple[int, int, int]:
    """Double the step along the finest axis until a layer is small enough."""
    steps = [1, 1, 1]
    while np.prod([-(-n // step) for n, step in zip(shape, steps)]) > MAX_VOXELS:
        finest = int(np.argmin([size * step for size, step in zip(spacing_mm, steps)]))
        steps[finest] *= 2
    return steps[0], steps[1], steps[2]


def _affine(
    affine: NDArray[Any], box: tuple[slice, slice, slice], steps: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Place the cropped and coarsened grid where the scan is."""
    moved = np.array(affine, dtype=np.float64)
    first = [cut.start + (step - 1) / 2.0 for cut, step in zip(box, steps)]
    moved[:3, 3] += moved[:3, :3] @ first
    moved[:3, :3] *= steps
    return moved


def _part(
    data: NDArray[Any], box: tuple[slice, slice, slice], steps: tuple[int, int, int]
) -> NDArray[Any]:
    """Cut out a box and average its blocks of voxels; of a mask (uint8), keep every lesion."""
    cut = data[box]  # first, since copies of a whole scan may be too much for memory
    return _coarser(cut != 0 if cut.dtype == np.uint8 else cut, steps)


def _coarser(data: NDArray[Any], steps: tuple[int, int, int]) -> NDArray[Any]:
    if steps == (1, 1, 1):
        return data
    # slab by slab: a padded copy of a whole scan may be too much for memory
    starts = range(0, data.shape[2], steps[2])
    slabs = (data[:, :, start : start + steps[2]] for start in starts)
    return np.stack([_average(slab, steps[:2]) for slab in slabs], axis=2)


def _average(slab: NDArray[Any], steps: tuple[int, int]) -> NDArray[Any]:
    """Make one slice of the coarser grid."""
    pad = [*((0, -n % step) for n, step in zip(slab.shape, steps)), (0, 0)]
    padded = np.pad(slab, pad, mode="edge")
    rows, columns = (n // step for n, step in zip(padded.shape, steps))
    blocks = padded.reshape(rows, steps[0], columns, steps[1], -1)
    inner = (1, 3, 4)
    return np.asarray(blocks.any(inner) if slab.dtype == np.bool_ else blocks.mean(inner))


def _pack(data: NDArray[Any], affine: NDArray[np.float64], low: float, high: float) -> str:
    """Write an 8-bit NIfTI, scaled between two values, as gzip in base64; the same every time."""
    if data.dtype == np.bool_:
        scaled, slope = data.astype(np.uint8), 1.0
    else:
        slope = (high - low) / 255.0
        levels = data - low
        levels /= slope
        np.rint(levels, out=levels)
        scaled = np.clip(levels, 0.0, 255.0, out=levels).astype(np.uint8)
    header = nib.nifti1.Nifti1Header()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(scaled.shape)
    header.set_sform(affine, code="scanner")
    header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = slope, low
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    plain = header.binaryblock + bytes(4) + scaled.tobytes(order="F")
    return base64.b64encode(gzip.compress(plain, _PACKING, mtime=0)).decode("ascii")
