"""Reading and writing volumes: values, geometry bit for bit, and writing all or nothing."""

from __future__ import annotations

import errno
import gzip
import itertools
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import numpy.typing as npt
import pytest
from nibabel.freesurfer.mghformat import MGHImage
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Header, Nifti2Image

from wmh_lora import volume as volume_module
from wmh_lora.errors import DataError, GridMismatchError
from wmh_lora.volume import Volume, write_nifti

SHAPE = (18, 16, 5)
GEOMETRY_FIELDS = (
    "dim_info",
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)
# Every assignment of the three world axes, with sign, to the three array axes.
ORIENTATIONS = [
    "".join(pair[sign] for pair, sign in zip(pairs, signs, strict=True))
    for pairs in itertools.permutations((("R", "L"), ("A", "P"), ("S", "I")))
    for signs in itertools.product((0, 1), repeat=3)
]


def _values(shape: tuple[int, ...] = SHAPE) -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).normal(100, 30, shape).astype(np.float32)


def _oblique(
    spacing_mm: tuple[float, float, float] = (0.9, 0.8, 4.0),
) -> npt.NDArray[np.float64]:
    """Affine turned about all three axes."""
    a, b, c = 0.3, -0.2, 0.5
    turn = (
        np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
        @ np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        @ np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    )
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing_mm
    affine[:3, 3] = (-71.3, 12.5, 33.1)
    return affine


def _load(path: Path) -> Any:
    """nibabel's own view of a file; its stubs know only the base class."""
    return nib.load(path)


def _raw_header(path: Path) -> Nifti1Header:
    """The header as stored, without nibabel's repairs."""
    content = path.read_bytes()
    block = (gzip.decompress(content) if path.suffix == ".gz" else content)[:540]
    kind = Nifti2Header if block[4:8] == b"n+2\0" else Nifti1Header
    header: Nifti1Header = kind(block[: kind.sizeof_hdr], check=False)
    return header


def _assert_same_geometry(output: Path, source: Path) -> None:
    ours, theirs = _raw_header(output), _raw_header(source)
    assert type(ours) is type(theirs)
    for field in GEOMETRY_FIELDS:
        a, b = np.asarray(ours[field]), np.asarray(theirs[field])
        assert a.astype(a.dtype.newbyteorder("<")).tobytes() == (
            b.astype(b.dtype.newbyteorder("<")).tobytes()
        ), field
    assert np.array_equal(_load(output).affine, _load(source).affine)


def _round_trip(source: Path, output: Path) -> Volume:
    """Write a mask and a probability map for `source`, check their geometry, return the volume."""
    volume = Volume.read(source)
    mask = (np.nan_to_num(volume.data) > 100).astype(np.uint8)
    write_nifti(output, mask, volume)
    _assert_same_geometry(output, source)
    written = _load(output)
    assert written.get_data_dtype() == np.uint8
    assert written.shape == volume.shape
    assert np.array_equal(np.asanyarray(written.dataobj), mask)
    return volume


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_every_orientation_keeps_values_and_geometry(tmp_path: Path, code: str) -> None:
    image = Nifti1Image(_values(), np.diag([0.9, 0.8, 4.0, 1.0]))
    start, target = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(code)
    turned = image.as_reoriented(nib.orientations.ornt_transform(start, target))
    turned.set_qform(turned.affine, code=1)
    turned.set_sform(turned.affine, code=2)
    source = tmp_path / "scan_FLAIR.nii.gz"
    turned.to_filename(source)
    volume = _round_trip(source, tmp_path / "mask.nii.gz")
    assert "".join(nib.aff2axcodes(volume.affine)) == code
    assert np.array_equal(volume.data, turned.get_fdata(dtype=np.float32))
    assert np.allclose(sorted(volume.spacing_mm), [0.8, 0.9, 4.0])


def test_there_are_48_orientations() -> None:
    assert len(set(ORIENTATIONS)) == 48


@pytest.mark.parametrize("kind", [Nifti1Image, Nifti2Image])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
def test_oblique_nifti(
    tmp_path: Path, kind: type[Nifti1Image], codes: tuple[int, int], suffix: str
) -> None:
    image = kind(_values(), _oblique())
    image.set_qform(_oblique(), code=codes[0])
    image.set_sform(_oblique(), code=codes[1])
    image.header.set_xyzt_units("mm", "sec")
    source = tmp_path / f"scan{suffix.lower()}"
    image.to_filename(source)
    source = source.rename(tmp_path / f"scan{suffix}")
    volume = Volume.read(source)
    assert np.array_equal(volume.data, _values())
    assert np.allclose(volume.affine, _oblique(), atol=1e-5)
    assert np.allclose(volume.spacing_mm, (0.9, 0.8, 4.0))
    assert volume.voxel_volume_ml == pytest.approx(0.9 * 0.8 * 4.0 / 1000)
    output = tmp_path / "mask.nii.gz"
    write_nifti(output, (volume.data > 100).astype(np.uint8), volume)
    if suffix != ".NII.GZ":
        _assert_same_geometry(output, source)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_number_types_and_byte_orders(tmp_path: Path, dtype: str, byte_order: str) -> None:
    values = np.abs(_values()).astype(dtype)
    header = Nifti1Header(endianness=byte_order)
    header.set_data_dtype(np.dtype(dtype))
    source = tmp_path / "scan.nii.gz"
    image = Nifti1Image(values, _oblique(), header)
    image.to_filename(source)
    volume = _round_trip(source, tmp_path / "mask.nii.gz")
    assert volume.data.dtype == np.float32
    assert np.array_equal(volume.data, values.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_scaled_integers_become_their_real_values(tmp_path: Path, dtype: type) -> None:
    stored = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 200
    image = Nifti1Image(stored.astype(dtype), _oblique())
    image.header.set_slope_inter(0.25, -30.5)
    source = tmp_path / "scan.nii.gz"
    image.to_filename(source)
    volume = _round_trip(source, tmp_path / "mask.nii.gz")
    assert np.array_equal(volume.data, (stored * 0.25 - 30.5).astype(np.float32))
    assert volume.data.min() < 0
    header = _raw_header(tmp_path / "mask.nii.gz")
    assert (float(header["scl_slope"]), float(header["scl_inter"])) == (1.0, 0.0)
    assert float(header["cal_max"]) == 1.0
    assert header["descrip"].item() == b"wmh-lora"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], 1.0),
        ([0, 0], 1.0),
        ([0.0, 0.7], 1.0),
        ([0, 12], 12.0),
        ([5.0, 900.5], 900.5),
        ([1.0, np.nan], 0.0),
        ([0.0, np.inf], 0.0),
    ],
)
def test_the_display_range_is_that_of_the_values(
    tmp_path: Path, values: list[float], expected: float
) -> None:
    array = np.resize(np.array(values, np.float32), SHAPE)
    write_nifti(tmp_path / "out.nii", array, Volume(array, _oblique()))
    header = _raw_header(tmp_path / "out.nii")
    assert (float(header["cal_min"]), float(header["cal_max"])) == (0.0, expected)


def test_nan_infinity_and_overflow_are_kept(tmp_path: Path) -> None:
    values = _values().astype(np.float64)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = np.nan, -np.inf, 1e300
    source = tmp_path / "scan.nii"
    Nifti1Image(values, _oblique()).to_filename(source)
    data = Volume.read(source).data
    assert np.isnan(data[0, 0, 0])
    assert data[1, 0, 0] == -np.inf
    assert data[2, 0, 0] == np.inf


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_one_frame_is_squeezed_and_only_dim_changes(tmp_path: Path, extra: tuple[int, ...]) -> None:
    image = Nifti1Image(_values((*SHAPE, *extra)), _oblique())
    image.header["pixdim"][4] = 9.0
    source = tmp_path / "scan.nii.gz"
    image.to_filename(source)
    volume = _round_trip(source, tmp_path / "mask.nii.gz")
    assert volume.shape == SHAPE
    assert _raw_header(tmp_path / "mask.nii.gz")["dim"].tolist() == [3, *SHAPE, 1, 1, 1, 1]


def _write_with_header_fields(path: Path, **fields: Any) -> None:
    """Write a NIfTI whose header fields nibabel would repair or refuse."""
    image = Nifti1Image(_values(), _oblique())
    image.set_qform(_oblique(), code=1)
    image.set_sform(_oblique(), code=1)
    header = image.header.copy()
    header["vox_offset"] = 352
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + b"\0\0\0\0" + _values().tobytes(order="F"))


def test_odd_but_valid_fields_survive_bit_for_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pixdim = np.array([0, 0.9, 0.8, 4.0, 0, 7, 0, 0], dtype=np.float32)
    source = tmp_path / "scan.nii"
    _write_with_header_fields(
        source, pixdim=pixdim, xyzt_units=0, dim_info=57, aux_file=b"secret", descrip=b"name"
    )
    volume = Volume.read(source)
    write_nifti(tmp_path / "mask.nii", np.ones(SHAPE, np.uint8), volume)
    ours, theirs = _raw_header(tmp_path / "mask.nii"), _raw_header(source)
    for field in GEOMETRY_FIELDS:
        assert ours[field].tobytes() == theirs[field].tobytes(), field
    assert ours["aux_file"].item() == b""
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_zero_offset_means_directly_after_the_header(tmp_path: Path) -> None:
    source = tmp_path / "scan.nii"
    _write_with_header_fields(source, vox_offset=0)
    assert np.array_equal(Volume.read(source).data, _values())


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_compression_is_recognised_by_content(tmp_path: Path, name: str) -> None:
    image = Nifti1Image(_values(), _oblique())
    block = image.to_bytes()
    (tmp_path / name).write_bytes(block if name.endswith(".gz") else gzip.compress(block))
    assert np.array_equal(Volume.read(tmp_path / name).data, _values())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"qform_code": 0, "sform_code": 0}, "neither sform nor qform"),
        ({"srow_x": [-0.9, 0, 0, 0], "srow_y": [0, 0.8, 0, 0], "srow_z": [0, 0, 4, 0]}, "sform"),
        ({"quatern_b": np.nan}, "qform"),
        ({"xyzt_units": 1}, "metres"),
        ({"pixdim": [1, 1, 1, 1, 0, 0, 0, 0]}, "different voxel sizes"),
    ],
)
def test_doubtful_geometry_is_logged_but_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], words: str
) -> None:
    source = tmp_path / "scan.nii"
    _write_with_header_fields(source, **fields)
    with caplog.at_level(logging.WARNING, logger="wmh_lora"):
        volume = Volume.read(source)
    assert any(words in r.getMessage() and str(source) in r.getMessage() for r in caplog.records)
    write_nifti(tmp_path / "mask.nii", np.ones(SHAPE, np.uint8), volume)
    assert _load(tmp_path / "mask.nii").header["qform_code"] == volume.header["qform_code"]  # type: ignore[index]


@pytest.mark.parametrize("suffix", [".mgz", ".mgh", ".MGZ"])
def test_freesurfer_volumes(tmp_path: Path, suffix: str) -> None:
    image = MGHImage(_values(), _oblique())
    source = tmp_path / f"scan{suffix.lower()}"
    image.to_filename(source)
    expected = image.header.get_affine()
    volume = Volume.read(source.rename(tmp_path / f"scan{suffix}"))
    assert np.array_equal(volume.data, _values())
    assert np.array_equal(volume.affine, expected)
    assert volume.header is None
    write_nifti(tmp_path / "mask.nii.gz", np.ones(SHAPE, bool), volume)
    written = _load(tmp_path / "mask.nii.gz")
    assert written.get_data_dtype() == np.uint8
    for form in (written.get_sform(coded=True), written.get_qform(coded=True)):
        assert form[1] == 1
        assert np.allclose(form[0], volume.affine, atol=1e-4)
    assert written.header.get_xyzt_units()[0] == "mm"


def _nrrd_header(space: str, affine: npt.NDArray[np.float64]) -> dict[str, Any]:
    signs = {"L": -1, "P": -1}
    names = {"left-posterior-superior": "LPS", "left-anterior-superior": "LAS"}
    letters = names.get(space, space if len(space) == 3 else "RAS")
    flip = np.array([signs.get(letters[0], 1), signs.get(letters[1], 1), 1])
    return {
        "space": space,
        "space directions": (affine[:3, :3] * flip[:, None]).T,
        "space origin": affine[:3, 3] * flip,
    }


@pytest.mark.parametrize(
    "space",
    ["LPS", "RAS", "LAS", "left-posterior-superior", "right-anterior-superior"],
)
@pytest.mark.parametrize("encoding", ["gzip", "raw", "bzip2"])
def test_nrrd_spaces(tmp_path: Path, space: str, encoding: str) -> None:
    source = tmp_path / "scan.nrrd"
    header = {**_nrrd_header(space, _oblique()), "encoding": encoding}
    nrrd.write(str(source), _values(), header)
    volume = Volume.read(source)
    assert np.array_equal(volume.data, _values())
    assert np.allclose(volume.affine, _oblique())
    write_nifti(tmp_path / "mask.nii.gz", np.ones(SHAPE, np.float32), volume)
    written = _load(tmp_path / "mask.nii.gz")
    assert np.allclose(written.affine, _oblique(), atol=1e-5)
    assert np.allclose(written.get_qform(), _oblique(), atol=1e-4)


@pytest.mark.parametrize("axis", [0, 3])
def test_nrrd_singleton_list_axis_is_dropped(tmp_path: Path, axis: int) -> None:
    header = _nrrd_header("LPS", _oblique())
    header["space directions"] = np.insert(header["space directions"], axis, np.nan, axis=0)
    header["kinds"] = np.insert(np.array(["domain"] * 3, dtype=object), axis, "list").tolist()
    source = tmp_path / "scan.nrrd"
    nrrd.write(str(source), np.expand_dims(_values(), axis), header)
    volume = Volume.read(source)
    assert np.array_equal(volume.data, _values())
    assert np.allclose(volume.affine, _oblique())


def test_nrrd_spacings_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "scan.nrrd"
    nrrd.write(str(source), _values(), {"spacings": [0.9, 0.8, 4.0]})
    volume = Volume.read(source)
    assert np.allclose(volume.spacing_mm, (0.9, 0.8, 4.0))
    assert "no orientation" in caplog.text


def test_sheared_axes_leave_the_qform_unset(tmp_path: Path) -> None:
    affine = _oblique()
    affine[:3, 0] += 0.3 * affine[:3, 1]
    write_nifti(tmp_path / "m.nii", np.ones(SHAPE, np.uint8), Volume(_values(), affine))
    written = _load(tmp_path / "m.nii")
    assert np.allclose(written.affine, affine, atol=1e-5)
    assert written.header["qform_code"] == 0


def test_stale_header_yields_to_the_affine(tmp_path: Path) -> None:
    source = tmp_path / "scan.nii"
    Nifti1Image(_values(), _oblique()).to_filename(source)
    moved = _oblique()
    moved[:3, 3] += 10
    volume = Volume(_values(), moved, header=Volume.read(source).header)
    write_nifti(tmp_path / "m.nii", np.ones(SHAPE, np.uint8), volume)
    assert np.allclose(_load(tmp_path / "m.nii").affine, moved, atol=1e-5)


def test_probabilities_keep_their_bits(tmp_path: Path) -> None:
    prob = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    for order in ("C", "F"):
        path = tmp_path / f"{order}.nii.gz"
        write_nifti(path, np.asarray(prob, order=order), Volume(_values(), _oblique()))
        written = _load(path)
        assert written.get_data_dtype() == np.float32
        assert np.array_equal(np.asanyarray(written.dataobj), prob)
    assert (tmp_path / "C.nii.gz").read_bytes() == (tmp_path / "F.nii.gz").read_bytes()


def test_constant_masks_are_read_on_request(tmp_path: Path) -> None:
    write_nifti(tmp_path / "m.nii.gz", np.zeros(SHAPE, np.uint8), Volume(_values(), _oblique()))
    assert not Volume.read(tmp_path / "m.nii.gz", allow_constant=True).data.any()


def test_write_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    volume = Volume(_values(), _oblique(), path=Path("scan.nii"))
    with pytest.raises(GridMismatchError, match=r"scan\.nii"):
        write_nifti(tmp_path / "m.nii.gz", np.ones((3, 3, 3), np.uint8), volume)
    with pytest.raises(DataError, match=r"end the name in \.nii\.gz"):
        write_nifti(tmp_path / "m.mgz", np.ones(SHAPE, np.uint8), volume)
    for dtype in (np.complex64, np.float16):
        with pytest.raises(TypeError):
            write_nifti(tmp_path / "m.nii.gz", np.ones(SHAPE, dtype), volume)
    (tmp_path / "old.nii.gz").write_bytes(b"old")
    with pytest.raises(DataError, match="--overwrite"):
        write_nifti(tmp_path / "old.nii.gz", np.ones(SHAPE, np.uint8), volume)
    assert [p.name for p in tmp_path.iterdir()] == ["old.nii.gz"]
    write_nifti(tmp_path / "old.nii.gz", np.ones(SHAPE, np.uint8), volume, overwrite=True)
    assert _load(tmp_path / "old.nii.gz").shape == SHAPE


@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_full_disk_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def stop_halfway(stream: Any, header: Nifti1Header, array: npt.NDArray[Any]) -> None:
        stream.write(header.binaryblock)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(volume_module, "_write_stream", stop_halfway)
    with pytest.raises(DataError, match="no space is left on the disk"):
        write_nifti(tmp_path / name, np.ones(SHAPE, np.uint8), Volume(_values(), _oblique()))
    assert list(tmp_path.iterdir()) == []


def test_volume_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="3-D data and a 4 x 4 affine"):
        Volume(np.zeros((4, 4), np.float32), np.eye(4))
    with pytest.raises(ValueError, match="3-D data and a 4 x 4 affine"):
        Volume(np.zeros((4, 4, 4), np.float32), np.eye(3))


@pytest.mark.realdata
def test_real_scans_round_trip(tmp_path: Path, shared_data: Path) -> None:
    scans = [
        shared_data / "tabriz" / "sub-04" / "anat" / "sub-04_FLAIR.nii.gz",
        *sorted((shared_data / "ljubljana-longitudinal").rglob("*_FLAIR.nii.gz"))[:2],
    ]
    for number, scan in enumerate(scans):
        volume = _round_trip(scan, tmp_path / f"{number}.nii.gz")
        assert np.array_equal(volume.data, _load(scan).get_fdata(dtype=np.float32).squeeze())
