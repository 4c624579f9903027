"""An image of nibabel gives the volume that its file gives."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.freesurfer.mghformat import MGHImage
from nibabel.nifti1 import Nifti1Image, Nifti1Pair
from nibabel.nifti2 import Nifti2Image, Nifti2Pair
from nibabel.spm99analyze import Spm99AnalyzeImage

from tests.phantoms import brightness_model, head, write_head
from wmh_lora import segment
from wmh_lora.errors import UnreadableImageError
from wmh_lora.volume import Volume, write_nifti

SHAPE = (18, 16, 5)
OBLIQUE = np.array(
    [[0.8, -0.3, 0.2, -31.25], [0.31, 0.77, -0.4, 12.5], [-0.05, 0.4, 3.9, 7.75], [0, 0, 0, 1.0]]
)


def _load(path: Path) -> Any:
    return nib.load(path)


def _values(dtype: str = "float32") -> np.ndarray[Any, Any]:
    values = np.random.default_rng(5).normal(300, 90, SHAPE)
    return values.astype(dtype)


def _same(one: Volume, other: Volume) -> None:
    np.testing.assert_array_equal(one.data, other.data)
    np.testing.assert_array_equal(one.affine, other.affine)
    assert one.data.dtype == other.data.dtype == np.float32
    assert one.data.strides == other.data.strides


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint8", "uint16"])
@pytest.mark.parametrize("kind", [Nifti1Image, Nifti2Image])
@pytest.mark.parametrize("slope", [None, (0.37, -12.3)])
def test_loaded_nifti_equals_its_file(
    tmp_path: Path, kind: type, dtype: str, slope: tuple[float, float] | None
) -> None:
    image = kind(_values("float64"), OBLIQUE, dtype=dtype)
    image.set_qform(OBLIQUE, code="aligned")
    image.header.set_slope_inter(*(slope or (1.0, 0.0)))
    path = tmp_path / "scan_FLAIR.nii.gz"
    nib.save(image, path)
    taken, read = Volume.from_nibabel(_load(path)), Volume.read(path)
    _same(taken, read)
    assert taken.path == read.path
    # what is written for them is the same file, geometry fields included
    for name, volume in (("taken.nii", taken), ("read.nii", read)):
        write_nifti(tmp_path / name, np.zeros(SHAPE, np.uint8), volume)
    assert (tmp_path / "taken.nii").read_bytes() == (tmp_path / "read.nii").read_bytes()


@pytest.mark.parametrize("code", [0, 1, 4])
def test_image_in_memory_equals_what_saving_it_would_give(tmp_path: Path, code: int) -> None:
    image = Nifti1Image(_values(), OBLIQUE)
    image.set_sform(OBLIQUE, code=code)
    image.set_qform(OBLIQUE, code=code)
    nib.save(image, tmp_path / "scan.nii")
    again = Nifti1Image(_values(), image.affine, image.header)
    taken, read = Volume.from_nibabel(again), Volume.read(tmp_path / "scan.nii")
    _same(taken, read)
    assert taken.path is None


def test_voxels_changed_in_memory_are_not_taken_for_the_file(tmp_path: Path) -> None:
    image = Nifti1Image(_values(), OBLIQUE)
    nib.save(image, tmp_path / "scan.nii")
    np.asarray(image.dataobj)[...] += 1.0
    taken = Volume.from_nibabel(image)
    assert taken.path is None
    np.testing.assert_array_equal(taken.data, _values() + 1.0)


def test_new_affine_counts_more_than_the_old_header(tmp_path: Path) -> None:
    old = Nifti1Image(_values(), OBLIQUE)
    moved = OBLIQUE.copy()
    moved[:3, 3] += 40.0
    taken = Volume.from_nibabel(Nifti1Image(_values(), moved, old.header))
    np.testing.assert_allclose(taken.affine, moved, rtol=1e-6)
    write_nifti(tmp_path / "mask.nii", np.ones(SHAPE, np.uint8), taken)
    np.testing.assert_allclose(_load(tmp_path / "mask.nii").affine, moved, rtol=1e-6)


def test_other_formats(tmp_path: Path) -> None:
    nib.save(MGHImage(_values(), OBLIQUE), tmp_path / "scan.mgz")
    _same(Volume.from_nibabel(_load(tmp_path / "scan.mgz")), Volume.read(tmp_path / "scan.mgz"))
    nib.save(Spm99AnalyzeImage(_values(), np.diag([2.0, 2, 4, 1])), tmp_path / "scan.img")
    pair = Volume.from_nibabel(_load(tmp_path / "scan.img"))  # no reader of ours takes a pair
    np.testing.assert_array_equal(pair.data, _values())
    assert pair.spacing_mm == (2.0, 2.0, 4.0)
    assert pair.header is None


def test_nonfinite_values_and_a_single_frame_are_kept_as_in_a_file(tmp_path: Path) -> None:
    values = _values()[..., None]
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = np.nan, np.inf, -np.inf
    nib.save(Nifti1Image(values, OBLIQUE), tmp_path / "scan.nii")
    _same(Volume.from_nibabel(_load(tmp_path / "scan.nii")), Volume.read(tmp_path / "scan.nii"))


def test_oddities_are_told_as_for_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = Nifti1Image(_values(), None)
    image.header.set_zooms((0.9, 0.9, 4.0))
    nib.save(image, tmp_path / "scan.nii")
    told = []
    for take in (lambda path: Volume.from_nibabel(_load(path)), Volume.read):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="wmh_lora"):
            take(tmp_path / "scan.nii")
        told.append(caplog.messages)
    assert told[0] == told[1]
    assert "left and right" in told[0][0]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Nifti1Image(np.ones((20, 20, 4, 2), np.float32), OBLIQUE), "series of 2 frames"),
        (Nifti1Image(np.ones((20, 20), np.float32), OBLIQUE), "2-D image"),
        (Nifti1Image(np.ones(SHAPE, np.complex64), OBLIQUE), "complex"),
        (Nifti1Image(np.zeros(SHAPE, np.float32), OBLIQUE), "constant"),
        (Nifti1Image(np.full(SHAPE, np.nan, np.float32), OBLIQUE), "no number at all"),
        (Nifti1Image(_values(), np.diag([50.0, 50, 50, 1])), "impossible voxel size"),
        (Spm99AnalyzeImage(_values(), np.full((4, 4), np.nan)), "NaN"),
    ],
)
def test_refuses_in_one_sentence(image: Any, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason) as caught:
        Volume.from_nibabel(image)
    assert "the nibabel image" in str(caught.value)


def test_file_that_is_damaged_behind_its_header(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    nib.save(Nifti1Image(_values(), OBLIQUE), path)
    path.write_bytes(path.read_bytes()[:-900])
    image = _load(path)
    with pytest.raises(UnreadableImageError, match=r"scan\.nii\.gz"):
        Volume.from_nibabel(image)


def test_segmenting_an_image_equals_segmenting_its_file(tmp_path: Path) -> None:
    path = write_head(tmp_path / "sub-01_FLAIR.nii.gz")
    model = brightness_model(min_voxels=0)
    of_file = segment(path, model=model, device="cpu")
    of_image = segment(_load(path), model=model, device="cpu")
    np.testing.assert_array_equal(of_image.probability, of_file.probability)
    assert of_image.report() == of_file.report()
    assert of_file.mask.any()
    volume, _ = head()
    in_memory = Nifti1Image(volume.data, volume.affine)
    of_memory = segment(in_memory, model=model, device="cpu")
    np.testing.assert_array_equal(of_memory.mask, of_file.mask)


@pytest.mark.parametrize("kind", [Nifti1Pair, Nifti2Pair])
def test_what_is_written_for_a_pair_of_files_is_one_file(tmp_path: Path, kind: type) -> None:
    nib.save(kind(_values(), OBLIQUE), tmp_path / "scan.img")
    volume = Volume.from_nibabel(_load(tmp_path / "scan.img"))
    mask = (_values() > 300).astype(np.uint8)
    write_nifti(tmp_path / "mask.nii.gz", mask, volume)
    read = Volume.read(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(read.data, mask)
    np.testing.assert_array_equal(read.affine, volume.affine)


def test_complex_voxels_under_a_real_header_are_refused() -> None:
    image = Nifti1Image(_values(), OBLIQUE)
    complex_image = Nifti1Image(_values().astype(np.complex64), OBLIQUE, image.header)
    complex_image.set_data_dtype(np.float32)
    with pytest.raises(UnreadableImageError, match="complex"):
        Volume.from_nibabel(complex_image)
