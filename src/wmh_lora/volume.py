"""A scan as an array with its place in space, read from and written to image files.

Geometry is sacred here: a mask or probability map must overlay the scan it was made from in every
viewer, so the output copies the stored geometry of a NIfTI input bit for bit.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError, SpatialImage

from wmh_lora.errors import DataError, GridMismatchError, UnreadableImageError, WMHError
from wmh_lora.files import IMAGE_SUFFIXES, find_images, image_stem, image_suffix, open_atomic
from wmh_lora.volume_checks import check_content
from wmh_lora.volume_nibabel import image_file, image_name, take_image
from wmh_lora.volume_readers import RawImage, nifti_affine, read_mgh, read_nifti, read_nrrd

__all__ = [
    "GRID_TOLERANCE",
    "IMAGE_SUFFIXES",
    "Volume",
    "corners_apart_mm",
    "find_images",
    "grid_difference",
    "image_stem",
    "open_atomic",
    "voxel_volume_ml",
    "write_nifti",
]

#: Furthest that a corner of one grid may lie from the other's, in edges of the smallest voxel side.
#: Headers written by different programs differ by rounding, a thousand times less.
GRID_TOLERANCE = 0.1

# Masks and probabilities are mostly zeros: higher levels cost time and save little.
_GZIP_LEVEL = 2
# Shear, as the sine between axes, that a quaternion (qform) cannot express but float noise can.
_MAX_SHEAR = 1e-3
# Fields about the content of the input, which the output must not inherit. Geometry stays.
_CONTENT_FIELDS: dict[str, Any] = {
    "data_type": b"",
    "db_name": b"",
    "extents": 0,
    "session_error": 0,
    "intent_p1": 0.0,
    "intent_p2": 0.0,
    "intent_p3": 0.0,
    "intent_code": 0,
    "intent_name": b"",
    "aux_file": b"",
    "glmax": 0,
    "glmin": 0,
    "cal_min": 0.0,
    "scl_slope": 1.0,
    "scl_inter": 0.0,
    "descrip": b"wmh-lora",
}


def voxel_volume_ml(affine: npt.NDArray[np.float64]) -> float:
    """Return the volume of a voxel in mL, shear included: the determinant of an affine in mm."""
    return float(abs(np.linalg.det(affine[:3, :3]))) / 1000.0


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3-D scalar image in its native voxel order.

    Attributes
    ----------
    data : (I, J, K) array of float32
        Scaled intensities, in the unit of the file; NaN and infinity are kept.
    affine : (4, 4) array of float64
        Voxel index to RAS millimetres.
    path : Path or None
        Where it was read from.
    header : Nifti1Header or None
        For NIfTI input, the header exactly as stored (a `Nifti2Header` for NIfTI-2): the source of
        the output's geometry. Must describe the same space as `affine`; `write_nifti` falls back to
        `affine` where it does not.
    """

    data: npt.NDArray[np.float32]
    affine: npt.NDArray[np.float64]
    path: Path | None = None
    header: Nifti1Header | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or self.affine.shape != (4, 4):
            raise ValueError(
                f"a volume needs 3-D data and a 4 x 4 affine, not shapes {self.data.shape} and "
                f"{self.affine.shape}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along each axis, ``(I, J, K)``."""
        rows, columns, slices = self.data.shape
        return rows, columns, slices

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel edge along each array axis, in mm (length of the affine's columns)."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return i, j, k

    @property
    def voxel_volume_ml(self) -> float:
        """Volume of one voxel in mL, shear included (determinant of the affine)."""
        return voxel_volume_ml(self.affine)

    def finite_data(self) -> npt.NDArray[np.float32]:
        """Return the intensities, 0 for NaN and infinity; `data` itself where all are finite."""
        if np.isfinite(self.data).all():
            return self.data
        return np.nan_to_num(self.data, nan=0.0, posinf=0.0, neginf=0.0)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, allow_constant: bool = False) -> Volume:
        """Read a .nii, .nii.gz, .mgz, .mgh or .nrrd file holding one 3-D image.

        Any orientation, oblique axes and any voxel shape are kept as stored. Dimensions of size 1
        after the third are dropped. Integer scaling is applied.

        Parameters
        ----------
        path : path-like
            The file.
        allow_constant : bool
            Accept an image whose voxels are all equal: masks may be empty, scans are not.

        Raises
        ------
        UnreadableImageError
            The file is absent, damaged, of another format, or holds no 3-D scalar image with a
            plausible geometry; the message says which and what to do.
        """
        source = Path(path)
        image = _read_any(source)
        check_content(source, image.data, allow_constant=allow_constant)
        return cls(data=image.data, affine=image.affine, path=source, header=image.header)

    @classmethod
    def from_nibabel(cls, image: SpatialImage, *, allow_constant: bool = False) -> Volume:
        """Take over an image of nibabel: the same volume as `read` makes of its file.

        Geometry is the header's, where nibabel would keep the header on saving, else the image's
        affine. Values that are not finite are kept. The image is not changed.

        Parameters
        ----------
        image : nibabel SpatialImage
            One 3-D image, of any format; from ``nibabel.load``, or made in memory.
        allow_constant : bool
            Accept an image whose voxels are all equal.

        Returns
        -------
        Volume
            Its path is that of the file, if the voxels have stayed there; None if they are in
            memory, where they may have been changed.

        Raises
        ------
        UnreadableImageError
            As for `read`.

        Examples
        --------
        >>> from nibabel.nifti1 import Nifti1Image
        >>> head = np.arange(16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
        >>> Volume.from_nibabel(Nifti1Image(head, np.diag([1.0, 1.0, 5.0, 1.0]))).spacing_mm
        (1.0, 1.0, 5.0)
        """
        name = image_name(image)
        with _errors_in_a_sentence(name):
            taken = take_image(image)
        check_content(name, taken.data, allow_constant=allow_constant)
        return cls(taken.data, taken.affine, path=image_file(image), header=taken.header)


def grid_difference(image: Volume, other: Volume) -> str | None:
    """Say how two grids differ, or None if every corner agrees within `GRID_TOLERANCE`."""
    if image.shape != other.shape:
        return f"{_sides(image)} against {_sides(other)} voxels"
    apart_mm = corners_apart_mm(image, other)
    if apart_mm <= GRID_TOLERANCE * min(image.spacing_mm):
        return None
    return f"equal shapes, but they lie up to {apart_mm:.3g} mm apart"


def corners_apart_mm(image: Volume, other: Volume) -> float:
    """Return how far apart the most distant corners of two grids of one shape lie."""
    ends = [(-0.5, n - 0.5) for n in image.shape]
    corners = np.stack([*(axis.ravel() for axis in np.meshgrid(*ends)), np.ones(8)])
    return float(np.linalg.norm(((image.affine - other.affine) @ corners)[:3], axis=0).max())


def _sides(volume: Volume) -> str:
    return " x ".join(map(str, volume.shape))


def write_nifti(
    path: str | os.PathLike[str],
    array: npt.NDArray[Any],
    like: Volume,
    *,
    overwrite: bool = False,
) -> None:
    """Write an array on the grid of `like` as NIfTI, completely or not at all.

    Where `like` came from a NIfTI file, the same NIfTI version is written, and dim, pixdim (qfac
    included), qform, sform, their codes and the units are copied bit for bit, in little-endian
    order. A 4-D input of one frame gives a 3-D output: only dim changes. For other formats, sform
    and, unless the axes are sheared, qform are set from the affine. Equal input gives equal bytes.

    Parameters
    ----------
    path : path-like
        Target ending in .nii or .nii.gz, in an existing folder.
    array : (I, J, K) array
        Stored in its own dtype (uint8 for masks, float32 for probabilities), unscaled; bool is
        stored as uint8.
    like : Volume
        Gives shape and geometry.
    overwrite : bool
        Replace a file that exists.

    Raises
    ------
    GridMismatchError
        `array` and `like` differ in shape.
    DataError
        Another file name ending, a file that exists, or a file system that refuses.
    TypeError
        A dtype that NIfTI cannot store as numbers.
    """
    target = Path(path)
    suffix = image_suffix(target)
    if suffix not in (".nii", ".nii.gz"):
        raise DataError(f"Cannot write {target}: outputs are NIfTI; end the name in .nii.gz.")
    if array.shape != like.shape:
        raise GridMismatchError(
            f"Cannot write {target}: the array has shape {array.shape}, but {like.path or 'its'} "
            f"grid has {like.shape}; bring it back to that grid first."
        )
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    header = _output_header(array.dtype, like)
    header["cal_max"] = _display_maximum(array)
    with open_atomic(target, overwrite=overwrite) as stream:
        if suffix == ".nii":
            _write_stream(stream, header, array)
        else:
            # No name and no time in the gzip header, so that equal images are equal files.
            with gzip.GzipFile("", "wb", _GZIP_LEVEL, stream, mtime=0) as packed:
                _write_stream(cast(BinaryIO, packed), header, array)


def _read_any(path: Path) -> RawImage:
    """Choose the reader by the name's ending."""
    readers = {".nrrd": read_nrrd, ".mgz": read_mgh, ".mgh": read_mgh}
    with _errors_in_a_sentence(path):
        return readers.get(_readable_suffix(path), read_nifti)(path)


@contextmanager
def _errors_in_a_sentence(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into one sentence."""
    try:
        # Absurd header values overflow on the way to the check that names them.
        with np.errstate(all="ignore"):
            yield
    except WMHError:
        raise
    except EOFError as error:
        raise UnreadableImageError(
            f"{path} is cut short (its compressed data stop early); copy or export the image again."
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableImageError(
            f"{path} has damaged compressed data; copy or export the image again."
        ) from error
    except OSError as error:
        raise UnreadableImageError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions and disk."
        ) from error
    except MemoryError as error:
        raise UnreadableImageError(
            f"{path} does not fit into memory; close other programs, or resample the image."
        ) from error
    # The parsers of nibabel and pynrrd meet arbitrary bytes here, and raise arbitrary errors.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(
            f"{path} has a damaged or unsupported header ({reason}); export the image again."
        ) from error


def _readable_suffix(path: Path) -> str:
    """Return the known suffix of a regular file, or say what stands there instead."""
    if path.is_dir():
        raise UnreadableImageError(f"{path} is a folder, not an image; give a file in it.")
    if not path.exists():
        raise UnreadableImageError(f"{path} does not exist; check the path.")
    if not path.is_file():
        raise UnreadableImageError(f"{path} is not a regular file; give an image file.")
    suffix = image_suffix(path)
    if suffix is None:
        known = ", ".join(IMAGE_SUFFIXES)
        pair = path.name.lower().endswith((".hdr", ".img", ".hdr.gz", ".img.gz"))
        advice = "a .hdr/.img pair into one .nii.gz" if pair else "DICOM with dcm2niix"
        raise UnreadableImageError(
            f"{path} is not of a format that can be read ({known}); convert {advice}."
        )
    if path.stat().st_size == 0:
        raise UnreadableImageError(f"{path} is an empty file (0 bytes); copy it again.")
    return suffix


def _output_header(dtype: np.dtype[Any], like: Volume) -> Nifti1Header:
    """Return a header with the geometry of `like` and nothing else of its content."""
    stored = like.header
    # A header that tells another place than the affine would put the mask elsewhere, silently.
    if stored is not None and np.array_equal(nifti_affine(stored), like.affine):
        header: Nifti1Header = stored.as_byteswapped("<")
    else:
        header = _header_from_affine(like)
    if int(header["dim"][0]) != 3 or tuple(header["dim"][1:4]) != like.shape:
        header["dim"] = (3, *like.shape, 1, 1, 1, 1)
    try:
        header.set_data_dtype(dtype)
    except HeaderDataError as error:
        raise TypeError(f"NIfTI cannot store values of type {dtype}") from error
    if dtype.kind not in "iuf":
        raise TypeError(f"only real numbers can be written, not {dtype}")
    for field, value in _CONTENT_FIELDS.items():
        if field in header.structarr.dtype.names:
            header[field] = value
    header["magic"] = header.single_magic  # of a pair of files as well, if `like` was one
    header["vox_offset"] = header.single_vox_offset
    return header


def _display_maximum(array: npt.NDArray[Any]) -> float:
    """Where a viewer's range ends: at 1 for masks and probabilities, else at the largest value.

    0, which leaves the range to the viewer, where a value is not finite.
    """
    largest = float(array.max())
    return max(1.0, largest) if math.isfinite(largest) else 0.0


def _header_from_affine(like: Volume) -> Nifti1Header:
    kind = Nifti2Header if isinstance(like.header, Nifti2Header) else Nifti1Header
    header: Nifti1Header = kind(endianness="<")  # type: ignore[no-untyped-call]
    header.set_data_shape(like.shape)
    header.set_zooms(like.spacing_mm)
    header.set_xyzt_units("mm")
    header.set_sform(like.affine, code="scanner")
    directions = like.affine[:3, :3] / np.asarray(like.spacing_mm)
    if np.allclose(directions.T @ directions, np.eye(3), atol=_MAX_SHEAR):
        header.set_qform(like.affine, code="scanner")
    return header


def _write_stream(stream: BinaryIO, header: Nifti1Header, array: npt.NDArray[Any]) -> None:
    """Write header, the empty extension flag and the voxels in Fortran order, slice by slice."""
    stream.write(header.binaryblock + b"\0\0\0\0")
    stored = array.dtype.newbyteorder("<")
    for k in range(array.shape[2]):
        stream.write(array[:, :, k].astype(stored, copy=False).tobytes(order="F"))
