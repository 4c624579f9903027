"""Any shape, spacing, rotation and number type survives writing and reading."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from nibabel.eulerangles import euler2mat
from nibabel.nifti1 import Nifti1Image
from nibabel.nifti2 import Nifti2Image

from wmh_lora.volume import Volume, write_nifti

SPACING = st.floats(0.3, 10.0)
ANGLE = st.floats(-3.1, 3.1)
OFFSET = st.floats(-200.0, 200.0)


@st.composite
def affines(draw: st.DrawFn) -> npt.NDArray[np.float64]:
    """Rotated, anisotropic, shifted and possibly left-handed affines."""
    affine = np.eye(4)
    spacing_mm = [draw(SPACING) * draw(st.sampled_from([1, -1])) for _ in range(3)]
    affine[:3, :3] = euler2mat(draw(ANGLE), draw(ANGLE), draw(ANGLE)) * spacing_mm
    affine[:3, 3] = [draw(OFFSET) for _ in range(3)]
    return affine


@given(
    affine=affines(),
    shape=st.permutations([3, 16, 17]),
    kind=st.sampled_from([Nifti1Image, Nifti2Image]),
    codes=st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any),
    dtype=st.sampled_from(["u1", "i2", "f4", "f8"]),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
def test_output_geometry_equals_input_bit_for_bit(
    affine: npt.NDArray[np.float64],
    shape: list[int],
    kind: type[Nifti1Image],
    codes: tuple[int, int],
    dtype: str,
    suffix: str,
) -> None:
    values = (np.arange(np.prod(shape)).reshape(shape) % 250).astype(dtype)
    image = kind(values, affine)
    image.set_sform(affine, code=codes[0])
    image.set_qform(affine, code=codes[1])
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, f"scan{suffix}"), Path(folder, f"mask{suffix}")
        image.to_filename(source)
        volume = Volume.read(source)
        write_nifti(output, values.astype(np.uint8), volume)
        again = Volume.read(output)
    assert np.array_equal(volume.data, values)
    assert np.array_equal(again.data, values)
    assert np.array_equal(again.affine, volume.affine)
    assert np.allclose(volume.affine, affine, atol=1e-3)
    assert volume.header is not None
    assert again.header is not None
    for field in volume.header.structarr.dtype.names:
        if field.startswith(("dim", "pixdim", "qu", "qo", "qf", "sr", "sf", "xyzt", "slice")):
            assert again.header[field].tobytes() == volume.header[field].tobytes(), field
