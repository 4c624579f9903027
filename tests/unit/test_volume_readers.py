"""Damaged and unsuitable inputs: one clear sentence each, naming the file, without stray output."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from nibabel.freesurfer.mghformat import MGHImage
from nibabel.nifti1 import Nifti1Header, Nifti1Image, Nifti1Pair

from wmh_lora import volume_checks
from wmh_lora.errors import UnreadableImageError
from wmh_lora.volume import Volume

SHAPE = (18, 16, 5)
AFFINE = np.diag([0.9, 0.8, 4.0, 1.0])


def _values(shape: tuple[int, ...] = SHAPE) -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).normal(100, 30, shape).astype(np.float32)


def _save(path: Path, data: Any = None, affine: Any = AFFINE) -> Path:
    Nifti1Image(_values() if data is None else data, affine).to_filename(path)
    return path


def _save_raw(path: Path, **fields: Any) -> Path:
    """Store header fields that nibabel would not write, with the voxels of `_values`."""
    header = Nifti1Image(_values(), AFFINE).header.copy()
    header["vox_offset"] = 352
    header["sform_code"] = 1
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + b"\0\0\0\0" + _values().tobytes(order="F"))
    return path


def _refused(path: Path, words: str) -> None:
    with pytest.raises(UnreadableImageError, match=words) as caught:
        Volume.read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.endswith(".")
    assert len(message) - len(str(path)) < 250


@pytest.mark.parametrize("name", ["absent.nii.gz", "absent.dcm"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    _refused(tmp_path / name, "does not exist; check the path")


def test_folder(tmp_path: Path) -> None:
    folder = tmp_path / "scan.nii.gz"
    folder.mkdir()
    _refused(folder, "is a folder")


@pytest.mark.parametrize("name", ["scan.hdr", "scan.img", "scan.dcm", "scan.png", "scan"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"anything")
    _refused(path, "pair into one" if name.endswith(("hdr", "img")) else "dcm2niix")


def test_half_of_a_pair_in_disguise(tmp_path: Path) -> None:
    Nifti1Pair(_values(), AFFINE).to_filename(tmp_path / "scan.hdr")
    path = (tmp_path / "scan.hdr").rename(tmp_path / "scan.nii")
    _refused(path, "one half of a .hdr/.img pair")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.mgz", "scan.nrrd"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    _refused(path, "empty file")


@pytest.mark.parametrize("content", [b"not an image\n" * 100, b"short", bytes(2000)])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.mgh", "scan.mgz", "scan.nrrd"])
@pytest.mark.parametrize("packed", [False, True])
def test_text_named_as_image(tmp_path: Path, name: str, content: bytes, packed: bool) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    _refused(path, "not a|cut short|damaged")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mgz", ".mgh"])
@pytest.mark.parametrize("keep", [10, 200, 1000, 0.5, -1])
def test_truncated_file(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"scan{suffix}"
    if suffix.startswith(".n"):
        _save(path)
    else:
        MGHImage(_values(), AFFINE).to_filename(path)
    content = path.read_bytes()
    if suffix == ".mgh" and keep == -1:
        keep = 284 + _values().nbytes - 1  # the rest is an optional footer
    count = int(len(content) * keep) if isinstance(keep, float) else keep
    path.write_bytes(content[:count])
    _refused(path, "cut short|not a NIfTI")


@pytest.mark.parametrize("position", [0.3, 0.9, -6])
def test_flipped_bits_in_compressed_data(tmp_path: Path, position: float) -> None:
    path = _save(tmp_path / "scan.nii.gz")
    content = bytearray(path.read_bytes())
    index = int(len(content) * position) if position > 0 else int(position)
    content[index] ^= 0xFF
    path.write_bytes(content)
    _refused(path, "damaged|cut short")


def test_sides_and_frames(tmp_path: Path) -> None:
    for shape in ((32, 32), (32, 32, 1), (1, 32, 32), (32, 1, 32), (32, 32, 1, 4)):
        _refused(_save(tmp_path / "scan.nii.gz", _values(shape)), "is a 2-D image")
    for frames in ((3,), (1, 3)):
        series = _values((*SHAPE, *frames))
        _refused(_save(tmp_path / "scan.nii.gz", series), "series of 3 frames.*fslroi")
    for shape in ((18, 16, 2), (15, 18, 5), (5, 15, 15)):
        _refused(_save(tmp_path / "scan.nii.gz", _values(shape)), "too small for a brain scan")
    _refused(_save(tmp_path / "scan.nii.gz", _values((18, 16, 0))), "empty image without voxels")


@pytest.mark.parametrize(("dtype", "words"), [("c8", "complex"), ("c16", "complex")])
def test_complex_data(tmp_path: Path, dtype: str, words: str) -> None:
    _refused(_save(tmp_path / "scan.nii.gz", _values().astype(dtype)), f"holds {words} values")


def test_colour_data(tmp_path: Path) -> None:
    rgb = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    _refused(_save(tmp_path / "scan.nii.gz", rgb), "holds RGB colour values")


def test_contents(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    _refused(_save(path, np.zeros(SHAPE, np.float32)), "is constant .*is 0")
    _refused(_save(path, np.full(SHAPE, 7, np.int16)), "is constant .*is 7")
    _refused(_save(path, np.full(SHAPE, np.nan, np.float32)), "every voxel is NaN or infinite")
    partly = np.full(SHAPE, np.nan, np.float32)
    partly[:9] = 3
    _refused(_save(path, partly), "is constant")


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([0.9, 0.8, 25.0, 1]),
        np.diag([0.9, 0.01, 4.0, 1]),
        np.diag([0.0009, 0.0009, 0.004, 1]),
    ],
)
def test_absurd_voxel_sizes(tmp_path: Path, affine: npt.NDArray[np.float64]) -> None:
    _refused(_save(tmp_path / "scan.nii.gz", affine=affine), "impossible voxel size")


@pytest.mark.parametrize("length", [0.0, -0.8, np.nan, np.inf, 1e6])
@pytest.mark.parametrize("sform_code", [0, 1])
def test_bad_pixdim(tmp_path: Path, length: float, sform_code: int) -> None:
    pixdim = [1, 0.9, length, 4, 0, 0, 0, 0]
    path = _save_raw(tmp_path / "scan.nii", pixdim=pixdim, sform_code=sform_code)
    _refused(path, "impossible voxel size")


@pytest.mark.parametrize(("unit", "name"), [(1, "metres"), (3, "micrometres")])
def test_unit_is_named_beside_an_absurd_size(tmp_path: Path, unit: int, name: str) -> None:
    pixdim = [1, 9e-4, 9e-4, 4e-3, 0, 0, 0, 0] if unit == 1 else [1, 900, 900, 4000, 0, 0, 0, 0]
    path = _save_raw(tmp_path / "scan.nii", pixdim=pixdim, xyzt_units=unit)
    _refused(path, f"the header counts in {name}")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([np.nan, 0, 0, 0], "NaN or infinity"),
        ([np.inf, 0, 0, 0], "NaN or infinity"),
        ([0, 0, 0, 0], "impossible voxel size|singular"),
        ([0, 0.8, 4.0, 0], "impossible voxel size|singular"),
        ([0.1, 8.0, 0.0, np.nan], "NaN or infinity"),
    ],
)
def test_bad_matrix(tmp_path: Path, row: list[float], words: str) -> None:
    _refused(_save_raw(tmp_path / "scan.nii", srow_x=row), words)


def test_singular_matrix_with_plausible_lengths(tmp_path: Path) -> None:
    rows = {"srow_x": [0.9, 0.9, 0, 0], "srow_y": [0, 0, 0.8, 0], "srow_z": [0, 0, 4, 0]}
    _refused(_save_raw(tmp_path / "scan.nii", **rows), "singular orientation matrix")


@pytest.mark.parametrize("packed", [False, True])
def test_huge_header_is_refused_before_memory_is_asked_for(tmp_path: Path, packed: bool) -> None:
    path = _save_raw(tmp_path / "scan.nii", dim=[3, 3000, 3000, 3000, 1, 1, 1, 1])
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    _refused(path, "announces 3000 x 3000 x 3000 voxels")


def test_header_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    path = _save_raw(tmp_path / "scan.nii", dim=[3, 800, 800, 800, 1, 1, 1, 1])
    _refused(path, "cut short")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"datatype": 9999}, "damaged or unsupported header"),
        ({"datatype": 0}, "damaged or unsupported header"),
        ({"datatype": 1}, "damaged or unsupported header"),
        ({"dim": [3, -18, 16, 5, 1, 1, 1, 1]}, "damaged header"),
        ({"dim": [0, 18, 16, 5, 1, 1, 1, 1]}, "damaged header"),
        ({"vox_offset": np.nan}, "damaged or unsupported header"),
        ({"vox_offset": 1e9}, "cut short"),
        ({"scl_slope": 2.0, "scl_inter": np.nan}, "damaged or unsupported header"),
    ],
)
def test_damaged_header_fields(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    _refused(_save_raw(tmp_path / "scan.nii", **fields), words)


def test_random_header_damage_never_escapes(
    tmp_path: Path, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever bytes are hit, the image is read or refused; nothing else is raised or printed."""
    path = _save_raw(tmp_path / "scan.nii")
    sound = path.read_bytes()
    refused = 0
    for _ in range(300):
        content = bytearray(sound)
        for position in rng.integers(0, Nifti1Header.sizeof_hdr, 6):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            Volume.read(path)
        except UnreadableImageError:
            refused += 1
    assert 0 < refused < 300
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("dims", "kind", "words"),
    [
        ((18, 16, 5, 2), 3, "series of 2 frames"),
        ((18, 16, 0, 1), 3, "empty image"),
        ((18, 16, 5, 1), 7, "not a FreeSurfer image"),
        ((3000, 3000, 3000, 1), 3, "announces 3000"),
    ],
)
def test_freesurfer_headers(tmp_path: Path, dims: tuple[int, ...], kind: int, words: str) -> None:
    path = tmp_path / "scan.mgh"
    MGHImage(_values(), AFFINE).to_filename(path)
    content = bytearray(path.read_bytes())
    content[4:24] = np.array([*dims, kind], dtype=">i4").tobytes()
    path.write_bytes(content)
    _refused(path, words)


NRRD = {
    "type": "float",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "18 16 5",
    "space directions": "(0.9,0,0) (0,0.8,0) (0,0,4)",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(0,0,0)",
}


def _save_nrrd(path: Path, **fields: str | None) -> Path:
    renamed = {name.replace("_", " "): value for name, value in fields.items()}
    lines = [f"{k}: {v}" for k, v in {**NRRD, **renamed}.items() if v is not None]
    header = "NRRD0005\n" + "\n".join(lines) + "\n\n"
    path.write_bytes(header.encode() + _values().tobytes(order="F"))
    return path


def test_sound_nrrd_is_read(tmp_path: Path) -> None:
    assert np.array_equal(Volume.read(_save_nrrd(tmp_path / "scan.nrrd")).data, _values())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sizes": "18 16 6"}, "damaged or unsupported header"),
        ({"sizes": "3000 3000 3000"}, "announces 3000"),
        ({"sizes": "18 80", "dimension": "2", "space_directions": "(1,0,0) (0,1,0)"}, "2-D image"),
        (
            {
                "sizes": "2 9 16 5",
                "dimension": "4",
                "space_directions": "none (1,0,0) (0,1,0) (0,0,4)",
                "kinds": "list domain domain domain",
            },
            "series of 2 frames",
        ),
        (
            {
                "sizes": "3 18 16 5",
                "dimension": "4",
                "space_directions": "none (1,0,0) (0,1,0) (0,0,4)",
                "kinds": "RGB-color domain domain domain",
            },
            "holds rgb-color values",
        ),
        ({"space_directions": "(0.9,0,0) (0.9,0,0) (0,0,4)"}, "singular"),
        ({"space_directions": "(0,0,0) (0,1,0) (0,0,4)"}, "impossible voxel size"),
        ({"space_directions": None, "space": None, "space_origin": None}, "no voxel size"),
        (
            {"space": None, "space_dimension": "2", "space_directions": "(1,0) (0,1) (1,1)"},
            "NRRD image in 2-D space",
        ),
        ({"type": "block"}, "holds block values"),
        ({"type": None}, "damaged or unsupported header"),
        ({"encoding": "hex"}, "damaged or unsupported header"),
        ({"data_file": "absent.raw"}, "cannot be read"),
    ],
)
def test_nrrd_headers(tmp_path: Path, fields: dict[str, str | None], words: str) -> None:
    _refused(_save_nrrd(tmp_path / "scan.nrrd", **fields), words)


def test_nrrd_of_unknown_space_is_read_as_lps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = Volume.read(_save_nrrd(tmp_path / "scan.nrrd", space="scanner-xyz"))
    assert np.allclose(np.diag(volume.affine), (-0.9, -0.8, 4.0, 1.0))
    assert "read as LPS" in caplog.text


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (PermissionError(13, "Permission denied"), "cannot be read .Permission denied"),
        (MemoryError(), "does not fit into memory"),
    ],
)
def test_system_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    path = _save(tmp_path / "scan.nii.gz")
    if isinstance(failure, MemoryError):
        monkeypatch.setattr(np, "empty", fail)
    else:
        monkeypatch.setattr(Path, "open", fail)
    _refused(path, words)


@pytest.mark.parametrize("link", [Path.symlink_to, shutil.copyfile])
def test_links_and_copies_read_alike(tmp_path: Path, link: Callable[[Path, Path], Any]) -> None:
    source = _save(tmp_path / "scan.nii.gz")
    other = tmp_path / "other.nii.gz"
    if link is Path.symlink_to:
        other.symlink_to(source)
    else:
        shutil.copyfile(source, other)
    assert np.array_equal(Volume.read(other).data, Volume.read(source).data)


def test_limits_admit_real_scans() -> None:
    """A 0.5 mm isotropic head and a thick-sliced clinical scan are both within the limits."""
    path = Path("scan.nii")
    assert volume_checks.check_shape(path, (512, 512, 400)) == (512, 512, 400)
    volume_checks.check_affine(path, np.diag([0.45, 0.45, 10.0, 1.0]))
    tilted = np.diag([0.5, 0.5, 5.0, 1.0])
    tilted[1, 2] = 5.0 * np.tan(np.radians(30))
    volume_checks.check_affine(path, tilted)


def test_a_name_that_the_file_system_refuses(tmp_path: Path) -> None:
    _refused(tmp_path / f"{'x' * 100}/{'y' * 290}.nii.gz", "cannot be read|does not exist")
