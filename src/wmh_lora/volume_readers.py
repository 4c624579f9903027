"""Read one file format each: header, checks, then voxels. `wmh_lora.volume.Volume.read` chooses.

NIfTI and MGH voxels are streamed slice by slice into the float32 result, so that a file takes no
more memory than its volume, a short file is noticed where it ends, and a damaged gzip checksum is
found. Whether a file is compressed is decided by its first bytes: files named ``.nii.gz`` that are
not compressed, and the reverse, are common.
"""

from __future__ import annotations

import gzip
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from nibabel.freesurfer.mghformat import DATA_OFFSET as MGH_DATA_OFFSET
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from wmh_lora.errors import UnreadableImageError
from wmh_lora.volume_checks import check_affine, check_shape, check_spacing, warn

__all__ = [
    "RawImage",
    "nifti_affine",
    "read_mgh",
    "read_nifti",
    "read_nrrd",
    "warn_nifti_oddities",
]

_COLOUR_OR_COMPLEX = {
    32: "complex",
    1792: "complex",
    2048: "complex",
    128: "RGB colour",
    2304: "RGBA colour",
}
_UNITS = {1: "metres", 3: "micrometres"}
# Cosine of the angle beyond which qform and sform describe different orientations.
_MIN_FORM_COSINE = float(np.cos(np.radians(20.0)))
# Signs that turn the first two axes of a NRRD space into right and anterior.
_NRRD_SPACES = {
    "right-anterior-superior": (1.0, 1.0),
    "ras": (1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0),
    "las": (-1.0, 1.0),
    "left-posterior-superior": (-1.0, -1.0),
    "lps": (-1.0, -1.0),
}
_NRRD_NOT_SPACE = ("list", "vector", "point", "normal", "covariant", "colour", "color", "complex")

# nibabel reports each repaired header field to its logger, and from there to stderr; this one is
# deaf. It is not registered under a name, so nothing global changes.
_DEAF_LOGGER = logging.Logger("nibabel header repairs")
_DEAF_LOGGER.addHandler(logging.NullHandler())


class RawImage(NamedTuple):
    """A file's content: data (I, J, K) float32, affine (4, 4) voxel -> RAS mm, NIfTI header."""

    data: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    header: Nifti1Header | None


def read_nifti(path: Path) -> RawImage:
    """Read a single-file NIfTI-1 or NIfTI-2 image, compressed or not, of either byte order.

    The header is returned as it is stored, without nibabel's repairs, so that a copy of it carries
    the same bits.
    """
    with _open_stream(path) as stream:
        header = _nifti_header(path, stream.read(Nifti2Header.sizeof_hdr))
        code = int(header["datatype"])
        if code in _COLOUR_OR_COMPLEX:
            raise UnreadableImageError(_not_scalar(path, _COLOUR_OR_COMPLEX[code]))
        repaired = header.copy()
        repaired.check_fix(logger=_DEAF_LOGGER, error_level=40)
        dimensions = int(header["dim"][0])
        if not 1 <= dimensions <= 7:
            raise UnreadableImageError(
                f"{path} has a damaged header ({dimensions} dimensions instead of 1 to 7); "
                "export the image again."
            )
        shape = check_shape(path, header["dim"][1 : dimensions + 1])
        unit = int(header["xyzt_units"]) & 7
        hint = f" (the header counts in {_UNITS[unit]})" if unit in _UNITS else ""
        check_spacing(path, header["pixdim"][1:4].astype(np.float64), hint)
        affine = nifti_affine(header)
        check_affine(path, affine, hint)
        warn_nifti_oddities(path, repaired, affine)
        slope, intercept = repaired.get_slope_inter()
        stream.seek(max(int(header["vox_offset"]), header.single_vox_offset))
        data = _read_voxels(path, stream, shape, repaired.get_data_dtype(), slope, intercept)
    return RawImage(data, affine, header)


def nifti_affine(header: Nifti1Header) -> npt.NDArray[np.float64]:
    """Return voxel -> RAS mm (4, 4) of a stored header, from sform, else qform, else pixdim."""
    repaired = header.copy()
    repaired.check_fix(logger=_DEAF_LOGGER, error_level=40)
    return np.asarray(repaired.get_best_affine(), dtype=np.float64)


def read_mgh(path: Path) -> RawImage:
    """Read a FreeSurfer volume (.mgh, or .mgz compressed)."""
    with _open_stream(path) as stream:
        block = stream.read(MGH_DATA_OFFSET)
        if len(block) < MGH_DATA_OFFSET:
            raise UnreadableImageError(_cut_short(path, "inside the header"))
        header = MGHHeader(block, check=False)
        if int(header["version"]) != 1 or int(header["type"]) not in (0, 1, 3, 4, 10):
            raise UnreadableImageError(
                f"{path} is not a FreeSurfer image (version and data type are unknown); "
                "convert it with `mri_convert`, or export it again."
            )
        shape = check_shape(path, header["dims"])
        affine = np.asarray(header.get_affine(), dtype=np.float64)
        check_affine(path, affine)
        if not int.from_bytes(block[28:30], "big"):
            warn(path, "the header has no orientation; FreeSurfer's default (coronal) is assumed.")
        data = _read_voxels(path, stream, shape, header.get_data_dtype(), None, None)
    return RawImage(data, affine, None)


def read_nrrd(path: Path) -> RawImage:
    """Read a NRRD volume in LPS, RAS or LAS space; an axis without direction must have size 1."""
    import nrrd  # only this format needs it

    with path.open("rb") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = nrrd.read_header(stream)
        sizes = [int(n) for n in header["sizes"]]
        kinds = [str(kind).lower() for kind in header.get("kinds", ["domain"] * len(sizes))]
        for kind, size in zip(kinds, sizes, strict=True):
            if size > 1 and ("color" in kind or kind in ("complex", "quaternion")):
                raise UnreadableImageError(_not_scalar(path, kind))
        if header["type"] == "block":
            raise UnreadableImageError(_not_scalar(path, "block"))
        directions, axes = _nrrd_axes(path, header, sizes, kinds)
        others = [axis for axis in range(len(sizes)) if axis not in axes]
        shape = check_shape(path, [sizes[axis] for axis in (*axes, *others)])
        affine = _nrrd_affine(path, header, directions)
        check_affine(path, affine)
        voxels = nrrd.read_data(header, stream, str(path), index_order="F")
    with np.errstate(over="ignore"):
        data = np.asarray(voxels.reshape(shape, order="F"), dtype=np.float32)
    return RawImage(data, affine, None)


@contextmanager
def _open_stream(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if compressed:
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield cast(BinaryIO, stream)
        else:
            yield raw


def _nifti_header(path: Path, block: bytes) -> Nifti1Header:
    """Parse the first bytes of a file without repairing them."""
    for kind, magic in ((Nifti1Header, b"n+1\0"), (Nifti2Header, b"n+2\0")):
        start = 344 if kind is Nifti1Header else 4
        found = block[start : start + 4]
        if len(block) < kind.sizeof_hdr:
            continue
        if found == magic:
            # nibabel's headers are untyped.
            header: Nifti1Header = kind(block[: kind.sizeof_hdr], check=False)  # type: ignore[no-untyped-call]
            return header
        if found == magic.replace(b"n+", b"ni"):
            raise UnreadableImageError(
                f"{path} is one half of a .hdr/.img pair; convert the pair into a single .nii.gz."
            )
    raise UnreadableImageError(
        f"{path} is not a NIfTI image (no NIfTI signature in its first {len(block)} bytes); "
        "check that the file is what its name says, or convert it with dcm2niix."
    )


def _read_voxels(
    path: Path,
    stream: BinaryIO,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    slope: float | None,
    intercept: float | None,
) -> npt.NDArray[np.float32]:
    """Read Fortran-ordered voxels from the stream's position, scaled in double precision."""
    rows, columns, slices = shape
    slice_bytes = rows * columns * dtype.itemsize
    if stream.seekable() and not isinstance(stream, gzip.GzipFile):
        # Known without decompression, so before memory is asked for.
        held = os.fstat(stream.fileno()).st_size - stream.tell()
        if held < slice_bytes * slices:
            where = f"in slice {max(held, 0) // slice_bytes + 1} of {slices}"
            raise UnreadableImageError(_cut_short(path, where))
    data = np.empty(shape, dtype=np.float32, order="F")
    # Values beyond float32 become infinite, as NaN is kept: preprocessing handles both.
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(slices):
            block = stream.read(slice_bytes)
            if len(block) < slice_bytes:
                raise UnreadableImageError(_cut_short(path, f"in slice {k + 1} of {slices}"))
            values = np.frombuffer(block, dtype=dtype).reshape((rows, columns), order="F")
            if slope is None or intercept is None or (slope, intercept) == (1.0, 0.0):
                data[:, :, k] = values
            else:
                data[:, :, k] = values.astype(np.float64) * slope + intercept
    # gzip compares its checksum at the end of the stream only.
    while isinstance(stream, gzip.GzipFile) and stream.read(1 << 20):
        pass
    return data


def warn_nifti_oddities(path: Path, header: Nifti1Header, affine: npt.NDArray[np.float64]) -> None:
    """Log what makes the orientation or the voxel size doubtful."""
    unit = int(header["xyzt_units"]) & 7
    if unit in _UNITS:
        warn(path, f"the header counts in {_UNITS[unit]}, but only millimetres fit its lengths.")
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    if sform_code == 0 and qform_code == 0:
        warn(path, "the header has neither sform nor qform; left and right may be swapped.")
    pixdim = header["pixdim"][1:4].astype(np.float64)
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(pixdim, spacing_mm, rtol=0.02):
        warn(
            path,
            f"pixdim {np.round(pixdim, 3).tolist()} and the orientation matrix "
            f"{np.round(spacing_mm, 3).tolist()} give different voxel sizes; the matrix is used.",
        )
    if sform_code > 0 and qform_code > 0:
        try:
            with np.errstate(all="ignore"):  # NaN in the quaternion
                qform = np.asarray(header.get_qform(), dtype=np.float64)[:3, :3]
        except (HeaderDataError, ValueError):
            warn(path, "the qform is invalid; the sform is used.")
            return
        cosines = np.sum(qform / pixdim * (affine[:3, :3] / spacing_mm), axis=0)
        if not (cosines > _MIN_FORM_COSINE).all():
            warn(path, "sform and qform give different orientations; the sform is used.")


def _nrrd_axes(
    path: Path, header: dict[str, Any], sizes: list[int], kinds: list[str]
) -> tuple[npt.NDArray[np.float64], list[int]]:
    """Return the vectors (3, 3), one row a spatial axis, and which axes of the file those are."""
    directions = header.get("space directions")
    if directions is not None:
        vectors = np.asarray(
            [row if row is not None else [np.nan] * 3 for row in directions], dtype=np.float64
        )
        axes = [axis for axis in range(len(sizes)) if np.isfinite(vectors[axis]).all()]
    elif "spacings" in header:
        spacings = np.asarray(header["spacings"], dtype=np.float64)
        axes = [
            axis
            for axis in range(len(sizes))
            if np.isfinite(spacings[axis]) and not any(k in kinds[axis] for k in _NRRD_NOT_SPACE)
        ][:3]
        vectors = np.zeros((len(sizes), 3))
        vectors[axes, range(len(axes))] = spacings[axes]
        warn(path, "the header has no orientation; left and right may be swapped.")
    else:
        raise UnreadableImageError(
            f"{path} has no voxel size (neither 'space directions' nor 'spacings'); "
            "export the image again with its geometry."
        )
    if len(axes) < 3:
        check_shape(path, [sizes[axis] for axis in axes])  # says that it is 2-D
    if len(axes) > 3 or vectors.shape[1] != 3:
        raise UnreadableImageError(
            f"{path} is a NRRD image in {vectors.shape[1]}-D space, but one 3-D image is needed; "
            "choose a frame and save it alone."
        )
    return vectors[axes], axes


def _nrrd_affine(
    path: Path, header: dict[str, Any], directions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    space = str(header.get("space", "")).lower()
    if space not in _NRRD_SPACES and "space directions" in header:
        # As ITK, and so 3D Slicer, do.
        warn(path, f"the space {space or 'of the axes'!r} is unknown; read as LPS.")
    affine = np.eye(4)
    affine[:3, :3] = directions.T
    affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), dtype=np.float64)
    affine[:2] *= np.asarray(_NRRD_SPACES.get(space, (-1.0, -1.0)))[:, None]
    return affine


def _not_scalar(path: Path, kind: str) -> str:
    return (
        f"{path} holds {kind} values, but one number a voxel is needed; "
        "give the magnitude or intensity image."
    )


def _cut_short(path: Path, where: str) -> str:
    return f"{path} is cut short (its data end {where}); copy or export the image again."
