"""The viewer's layers show the scan where it is, and its program is the one on record."""

from __future__ import annotations

import base64
import gzip
import hashlib
import tracemalloc
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray

from tests.reported_scans import segmented_head
from wmh_lora.report import viewer
from wmh_lora.report.outputs import Segmentation
from wmh_lora.report.viewer import Layer, viewer_program, viewer_scene
from wmh_lora.volume import Volume


def image_of(layer: Layer) -> nib.nifti1.Nifti1Image:
    return nib.nifti1.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(layer.nifti)))


def layer_named(segmentation: Segmentation, name: str) -> nib.nifti1.Nifti1Image:
    return image_of(next(x for x in viewer_scene(segmentation).layers if x.name == name))


def places_mm(mask: NDArray[np.generic], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Positions of the voxels of a mask, in a fixed order."""
    found = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    return found[np.lexsort(found.round(3).T)]


def turned(segmentation: Segmentation, axes: str) -> Segmentation:
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    volume = segmentation.volume
    return replace(
        segmentation,
        volume=Volume(
            apply_orientation(volume.data, turn), volume.affine @ inv_ornt_aff(turn, volume.shape)
        ),
        mask=apply_orientation(segmentation.mask, turn),
        probability=apply_orientation(segmentation.probability, turn),
        uncertainty=None,
        structure_masks={},
    )


def tiled(segmentation: Segmentation, times: int) -> Segmentation:
    """A scan that holds the same head so many times along each axis."""

    def repeat(array: NDArray[Any]) -> NDArray[Any]:
        return np.tile(array, (times,) * 3)

    volume = segmentation.volume
    return replace(
        segmentation,
        volume=Volume(repeat(volume.data), volume.affine),
        mask=repeat(segmentation.mask),
        probability=repeat(segmentation.probability),
        uncertainty=None,
        structure_masks={k: repeat(part) for k, part in segmentation.structure_masks.items()},
    )


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAR"])
def test_layers_lie_where_the_scan_lies(axes: str) -> None:
    segmentation = turned(segmented_head(), axes)
    image = layer_named(segmentation, "mask")
    np.testing.assert_allclose(
        places_mm(np.asarray(image.dataobj), image.affine),
        places_mm(segmentation.mask, segmentation.volume.affine),
        atol=1e-3,
    )


def test_all_layers_share_one_grid_of_bytes() -> None:
    images = [image_of(layer) for layer in viewer_scene(segmented_head()).layers]
    assert {image.shape for image in images} == {images[0].shape}
    assert all(image.get_data_dtype() == np.uint8 for image in images)
    assert len(images) == 5
    assert np.prod(images[0].shape) < segmented_head().mask.size  # cropped to the head


def test_values_survive_to_within_a_step() -> None:
    segmentation = segmented_head()
    probability = layer_named(segmentation, "probability").get_fdata()
    assert probability.max() == pytest.approx(0.9, abs=0.5 / 255)
    uncertainty = layer_named(segmentation, "uncertainty").get_fdata()
    assert uncertainty.max() == pytest.approx(0.09, abs=0.25 / 255)
    scene = viewer_scene(segmentation)
    flair = image_of(scene.layers[0]).get_fdata()
    step = (scene.layers[0].high - scene.layers[0].low) / 255
    image = layer_named(segmentation, "mask")
    lesion = np.asarray(image.dataobj) > 0
    original = segmentation.volume.data[segmentation.mask > 0]
    kept = np.clip(np.sort(original), scene.layers[0].low, scene.layers[0].high)
    np.testing.assert_allclose(np.sort(flair[lesion]), kept, atol=step)
    assert scene.window[0] >= scene.layers[0].low
    assert scene.window[1] <= scene.layers[0].high


def test_the_brightest_lesion_keeps_its_intensities() -> None:
    segmentation = segmented_head()
    data = segmentation.volume.data.copy()
    lesion = segmentation.mask > 0
    data[lesion] = data.max() * np.linspace(1.5, 3.0, int(lesion.sum()), dtype=np.float32)
    bright = replace(segmentation, volume=Volume(data, segmentation.volume.affine))
    flair = viewer_scene(bright).layers[0]
    shown = image_of(flair).get_fdata()
    assert flair.high == pytest.approx(data.max())
    assert len(np.unique(shown[shown > 1.4 * segmentation.volume.data.max()])) > 20


def test_headers_carry_nothing_of_the_file() -> None:
    header = layer_named(segmented_head(), "flair").header
    assert [bytes(header[key]).strip(b"\0") for key in ("descrip", "db_name", "aux_file")] == [
        b""
    ] * 3


def test_a_lesion_outside_the_head_is_kept() -> None:
    segmentation = segmented_head()
    mask = segmentation.mask.copy()
    mask[0, 0, 0] = 1
    image = layer_named(replace(segmentation, mask=mask), "mask")
    assert int(np.asarray(image.dataobj).sum()) == int(mask.sum())


def test_missing_values_are_shown_as_black() -> None:
    segmentation = segmented_head()
    data = segmentation.volume.data.copy()
    data[20:24] = np.nan
    volume = Volume(data, segmentation.volume.affine)
    image = layer_named(replace(segmentation, volume=volume), "flair")
    assert np.isfinite(image.get_fdata()).all()


class TestLargeScans:
    def test_are_coarsened_along_the_finest_axes(self) -> None:
        assert viewer._steps((200, 200, 40), (1.0, 1.0, 3.0)) == (1, 1, 1)
        assert viewer._steps((400, 400, 300), (0.5, 0.5, 0.6)) == (2, 2, 1)

    def test_keep_place_and_lesions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        segmentation = segmented_head()
        monkeypatch.setattr(viewer, "MAX_VOXELS", 3000)
        scene = viewer_scene(segmentation)
        assert scene.steps != (1, 1, 1)
        image = next(image_of(x) for x in scene.layers if x.name == "mask")
        shown = places_mm(np.asarray(image.dataobj), image.affine).mean(axis=0)
        true = places_mm(segmentation.mask, segmentation.volume.affine).mean(axis=0)
        assert np.abs(shown - true).max() < 4.0  # half of a coarse voxel
        assert np.asarray(image.dataobj).any()

    def test_take_little_memory_beside_what_is_held(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The page and the picture are made last, when scan and maps fill the memory."""
        large = tiled(segmented_head(), 7)
        monkeypatch.setattr(viewer, "MAX_VOXELS", 30_000)
        bytes_a_voxel = []
        for make in (viewer_scene, Segmentation.picture):
            tracemalloc.start()
            make(large)
            bytes_a_voxel.append(tracemalloc.get_traced_memory()[1] / large.mask.size)
            tracemalloc.stop()
        scene, picture = bytes_a_voxel
        assert scene < 3.0
        assert picture < 3.5


def test_equal_input_gives_equal_layers() -> None:
    assert viewer_scene(segmented_head()) == viewer_scene(segmented_head())


def test_a_scan_of_one_value_has_a_scene() -> None:
    segmentation = segmented_head()
    volume = Volume(np.full(segmentation.mask.shape, 7.0, np.float32), segmentation.volume.affine)
    assert len(viewer_scene(replace(segmentation, volume=volume)).layers) == 5


class TestProgram:
    def test_is_the_one_on_record(self) -> None:
        program = viewer_program()
        script = gzip.decompress(base64.b64decode(program.script))
        digest = hashlib.sha256(script).digest()
        assert digest.hex() == program.sha256
        assert program.source_hash == f"sha256-{base64.b64encode(digest).decode()}"

    def test_comes_with_its_licence(self) -> None:
        program = viewer_program()
        assert program.licence == "BSD-2-Clause"
        assert "Redistributions in binary form" in program.notices
        assert "nifti-reader-js" in program.notices

    def test_stays_small(self) -> None:
        assert len(viewer_program().script) < 1_200_000
