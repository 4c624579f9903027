"""The engine: its public API, test-time augmentation, devices and results on the scan's grid."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, inv_ornt_aff
from torch import Tensor, nn

import wmh_lora
from tests.phantoms import (
    BrightnessNet,
    brightness_model,
    head,
    t1_model,
    t1_of_head,
    write_head,
)
from wmh_lora.config import ModelConfig, PreprocessConfig, TtaMode
from wmh_lora.engine import Segmentation, WMHInferenceEngine, choose_device, segment
from wmh_lora.engine_views import VIEWS, turn
from wmh_lora.errors import (
    ConfigError,
    DeviceError,
    GridMismatchError,
    UnreadableImageError,
)
from wmh_lora.models.network import build_network
from wmh_lora.models.registry import Model
from wmh_lora.postprocess import apply_threshold, describe_lesions, remove_small_components
from wmh_lora.volume import Volume


@pytest.fixture
def model() -> Model:
    return brightness_model()


class ShiftNet(nn.Module):
    """Answers with its input moved by two columns: averaging its views shows every direction."""

    def forward(self, slices: Tensor) -> Tensor:
        return 10.0 * slices[:, 1:2].roll(2, -1) - 5.0


class TestPredict:
    def test_finds_the_lesions_of_a_phantom_exactly(self, model: Model) -> None:
        volume, reference = head()
        result = WMHInferenceEngine(model, "cpu").segment(volume)
        np.testing.assert_array_equal(result.mask, reference)
        assert [lesion.voxels for lesion in result.lesions] == [24, 4]
        assert result.volume_ml == pytest.approx(28 * 0.16)

    @pytest.mark.parametrize("tta", ["none", "flip", "d4"])
    def test_an_equivariant_network_gives_the_same_with_any_views(
        self, model: Model, tta: TtaMode
    ) -> None:
        volume, _ = head()
        engine = WMHInferenceEngine(model, "cpu")
        np.testing.assert_allclose(
            engine.predict(volume, tta=tta), engine.predict(volume), atol=1e-6
        )
        net = model.net
        assert isinstance(net, BrightnessNet)
        assert sum(shape[0] for shape in net.seen_shapes) <= (len(VIEWS[tta]) + 1) * 6

    def test_averages_probabilities_over_the_whole_group(self) -> None:
        """The mean over all eight views must be as symmetric as the group."""
        network = WMHInferenceEngine(ShiftNet(), "cpu")._network
        x, y = torch.meshgrid(*[torch.linspace(-1, 1, 16)] * 2, indexing="ij")
        disc = ((x**2 + y**2) < 0.5).float().expand(1, 3, -1, -1).contiguous().numpy()
        summed = sum(torch.from_numpy(network.see(disc, view).lesion) for view in VIEWS["d4"])
        assert isinstance(summed, Tensor)
        for view in VIEWS["d4"]:
            torch.testing.assert_close(turn(summed, view), summed)

    def test_batches_do_not_change_the_result(self) -> None:
        volume, _ = head()
        results = [
            WMHInferenceEngine(brightness_model(batch_size=n), "cpu").predict(volume, tta="flip")
            for n in (1, 4, 64)
        ]
        np.testing.assert_array_equal(results[0], results[1])
        np.testing.assert_array_equal(results[0], results[2])

    def test_pads_slices_to_what_the_network_takes(self, model: Model) -> None:
        net = model.net
        assert isinstance(net, BrightnessNet)
        net.size_multiple = 48  # type: ignore[assignment]
        volume, reference = head()
        result = WMHInferenceEngine(model, "cpu").segment(volume)
        assert all(h % 48 == 0 and w % 48 == 0 for _, _, h, w in net.seen_shapes)
        assert result.settings["preprocess"]["multiple_px"] == 48
        np.testing.assert_array_equal(result.mask, reference)

    def test_runs_a_network_that_can_take_t1_on_flair_alone(self) -> None:
        config = ModelConfig(
            encoder="compact",
            adaptation="full",
            t1_channels=3,
            decoder_channels=(8, 8, 8, 8),
            structures=("wmh",),
        )
        net = build_network(config, None, for_training=False)
        card = replace(
            brightness_model().card, model=config, preprocess=PreprocessConfig(pixel_size_mm=4.0)
        )
        loaded = Model(net=net, card=card, path=Path("t1"), sha256="1" * 64)
        volume, _ = head()
        probability = WMHInferenceEngine(loaded, "cpu").predict(volume)
        assert np.isfinite(probability).all()
        assert probability.max() > 0

    def test_reports_progress_to_the_end(self, model: Model) -> None:
        steps: list[tuple[int, int]] = []
        volume, _ = head()
        WMHInferenceEngine(model, "cpu").predict(
            volume, tta="flip", progress=lambda done, total: steps.append((done, total))
        )
        net: Any = model.net
        assert steps[-1] == (sum(shape[0] for shape in net.seen_shapes),) * 2
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)

    def test_does_not_depend_on_the_storage_order(self, model: Model) -> None:
        """All 48 orientations of one scan give one and the same mask."""
        volume, _ = head()
        engine = WMHInferenceEngine(model, "cpu")
        expected = engine.segment(volume)
        for axes in itertools.permutations(range(3)):
            for signs in itertools.product((1, -1), repeat=3):
                turn = np.array(list(zip(axes, signs, strict=True)), dtype=float)
                affine = volume.affine @ inv_ornt_aff(turn, volume.shape)
                turned = Volume(apply_orientation(volume.data, turn), affine)
                found = engine.segment(turned)
                np.testing.assert_array_equal(found.mask, apply_orientation(expected.mask, turn))
                assert [n.voxels for n in found.lesions] == [n.voxels for n in expected.lesions]

    def test_does_not_change_the_scan(self, model: Model) -> None:
        volume, _ = head()
        before = volume.data.copy()
        WMHInferenceEngine(model, "cpu").segment(volume, tta="d4")
        np.testing.assert_array_equal(volume.data, before)


class TestMaps:
    def test_structures_lie_on_the_scan(self, model: Model) -> None:
        volume, _ = head()
        result = WMHInferenceEngine(model, "cpu").segment(volume)
        assert set(result.structure_masks) == {"ventricles", "brain"}
        brain = result.structure_masks["brain"]
        assert brain.shape == volume.shape
        assert brain.dtype == np.uint8
        assert (brain[volume.data > 200] == 1).all()
        assert not result.structure_masks["ventricles"].any()

    def test_a_network_without_structures_has_no_masks(self) -> None:
        result = WMHInferenceEngine(BrightnessNet(structures=1), "cpu").segment(head()[0])
        assert dict(result.structure_masks) == {}

    def test_uncertainty_is_where_the_views_differ(self) -> None:
        volume, _ = head()
        engine = WMHInferenceEngine(ShiftNet(), "cpu")
        result = engine.segment(volume, tta="flip", adaptive=False)
        assert result.uncertainty is not None
        assert result.uncertainty.shape == volume.shape
        assert result.uncertainty.dtype == np.float32
        assert 0.1 < result.uncertainty.max() <= 0.5 + 1e-6
        assert engine.segment(volume, tta="none").uncertainty is None

    def test_equal_views_leave_no_uncertainty(self, model: Model) -> None:
        result = WMHInferenceEngine(model, "cpu").segment(head()[0], tta="d4")
        assert result.uncertainty is not None
        assert result.uncertainty.max() < 1e-6

    def test_what_was_prepared_ahead_gives_the_same(self, model: Model) -> None:
        volume, reference = head()
        engine = WMHInferenceEngine(model, "cpu")
        result = engine.segment(volume, prepared=engine.prepare(volume))
        np.testing.assert_array_equal(result.mask, reference)

    @pytest.mark.parametrize("fill", [0, 1])
    def test_lesions_are_those_of_the_whole_mask(self, model: Model, fill: int) -> None:
        """They are looked for within the bounds of the mask; an empty one has none."""
        volume, _ = head()
        result = WMHInferenceEngine(model, "cpu").segment(
            volume, min_voxels=4, threshold=0.5 if fill else 0.9999
        )
        whole = remove_small_components(
            apply_threshold(result.probability, result.settings["threshold"]), 4
        )
        np.testing.assert_array_equal(result.mask, whole)
        for found, expected in zip(
            result.lesions, describe_lesions(whole, volume.affine), strict=True
        ):
            assert found.voxels == expected.voxels
            assert found.centroid_mm == pytest.approx(expected.centroid_mm)


class TestPublicApi:
    """REFERENCE: exactly these calls, names and defaults."""

    def test_published_example(self, model: Model, tmp_path: Path) -> None:
        path = write_head(tmp_path / "FLAIR.nii.gz")
        engine = WMHInferenceEngine(model=model, device="cpu", img_size=512)
        prob_volume, nifti_ref = engine.predict_volume_probs(str(path), use_tta=True)
        mask = engine.cc_filter(engine.apply_threshold(prob_volume, threshold=0.60), min_v=3)
        assert prob_volume.dtype == np.float32
        assert (prob_volume.min() >= 0.0, prob_volume.max() <= 1.0) == (True, True)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, head()[1])
        stored = nib.nifti1.Nifti1Image.from_filename(path)
        assert isinstance(nifti_ref, nib.nifti1.Nifti1Image)
        np.testing.assert_array_equal(nifti_ref.affine, stored.affine)
        saved = nib.nifti1.Nifti1Image(mask, nifti_ref.affine, nifti_ref.header)
        for field in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units"):
            np.testing.assert_array_equal(saved.header[field], stored.header[field])
        np.testing.assert_allclose(nifti_ref.get_fdata(), stored.get_fdata())

    def test_use_tta_runs_eight_views(self, model: Model) -> None:
        volume, _ = head()
        engine = WMHInferenceEngine(model, "cpu")
        engine.predict_volume_probs(volume)
        with_tta = len(model.net.seen_shapes)  # type: ignore[arg-type]
        engine.predict_volume_probs(volume, use_tta=False)
        assert with_tta == 8 * (len(model.net.seen_shapes) - with_tta)  # type: ignore[arg-type]

    def test_accepts_a_bare_network_and_a_torch_device(self) -> None:
        engine = WMHInferenceEngine(
            model=BrightnessNet(structures=1), device=torch.device("cpu"), img_size=256
        )
        probability, reference = engine.predict_volume_probs(head()[0], use_tta=False)
        assert probability.shape == reference.shape

    def test_reference_of_a_volume_in_memory_or_of_nifti_2(
        self, model: Model, tmp_path: Path
    ) -> None:
        engine = WMHInferenceEngine(model, "cpu")
        volume, _ = head()
        _, reference = engine.predict_volume_probs(volume, use_tta=False)
        np.testing.assert_array_equal(reference.affine, volume.affine)
        path = tmp_path / "two.nii.gz"
        nib.nifti2.Nifti2Image(volume.data, volume.affine).to_filename(path)
        _, reference = engine.predict_volume_probs(path, use_tta=False)
        assert isinstance(reference, nib.nifti2.Nifti2Image)

    def test_default_threshold_and_size(self, model: Model) -> None:
        engine = WMHInferenceEngine(model, "cpu")
        assert engine.apply_threshold(np.array([[[0.59, 0.61]]])).tolist() == [[[0, 1]]]
        assert engine.cc_filter(np.array([[[1, 1, 0, 1, 1, 1]]])).tolist() == [[[0, 0, 0, 1, 1, 1]]]

    def test_package_offers_the_same_names(self) -> None:
        assert wmh_lora.segment is segment
        assert wmh_lora.Volume is Volume
        assert wmh_lora.Segmentation is Segmentation
        assert set(wmh_lora.__all__) <= set(dir(wmh_lora))
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = wmh_lora.no_such_name


class TestSettings:
    def test_come_from_the_model_unless_given(self) -> None:
        volume, _ = head()
        engine = WMHInferenceEngine(
            brightness_model(threshold=0.25, min_voxels=5, tta="flip"), "cpu"
        )
        result = engine.segment(volume)
        assert len(result.lesions) == 1
        assert {key: result.settings[key] for key in ("threshold", "min_voxels", "tta")} == {
            "threshold": 0.25,
            "min_voxels": 5,
            "tta": "flip",
        }
        assert result.settings["device"] == "cpu"
        given = engine.segment(volume, threshold=0.5, min_voxels=0, tta="none")
        assert len(given.lesions) == 2
        assert given.settings["min_voxels"] == 0

    @pytest.mark.parametrize("wrong", [{"threshold": 1.5}, {"min_voxels": -1}, {"tta": "all"}])
    def test_out_of_range(self, model: Model, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            WMHInferenceEngine(model, "cpu").segment(head()[0], **wrong)


class TestSegment:
    def test_from_a_file(self, model: Model, tmp_path: Path) -> None:
        result = segment(write_head(tmp_path / "sub-01_FLAIR.nii.gz"), model=model, device="cpu")
        files = result.save(tmp_path / "out")
        assert files.mask.name == "sub-01_space-orig_label-WMH_mask.nii.gz"
        assert result.model["name"] == "brightness"

    def test_repeats_what_the_reader_warned_about(self, model: Model) -> None:
        volume, _ = head()
        volume.data[:, :, 0] = np.nan
        result = segment(volume, model=model, device="cpu")
        assert len(result.warnings) == 1
        assert "17 % of the voxels" in result.warnings[0]
        assert len(result.lesions) == 2

    def test_unreadable(self, model: Model, tmp_path: Path) -> None:
        with pytest.raises(UnreadableImageError, match="does not exist"):
            segment(tmp_path / "absent.nii.gz", model=model, device="cpu")

    def test_library_use_prints_nothing(self, tmp_path: Path) -> None:
        """In a process of its own: in this one the command line may have set up logging."""
        code = (
            "import numpy as np; from tests.phantoms import *; from wmh_lora import segment; "
            "volume, _ = head(); volume.data[:, :, 0] = np.nan; "
            "assert segment(volume, model=brightness_model(), device='cpu').warnings"
        )
        root = Path(__file__).resolve().parents[2]
        finished = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


class TestDevices:
    def test_auto_takes_what_there_is(self) -> None:
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        assert accelerated or choose_device() == torch.device("cpu")

    @pytest.mark.parametrize("name", ["xyz", "meta", "cuda:99"])
    def test_refuses_the_unknown_and_the_absent(self, name: str) -> None:
        with pytest.raises(DeviceError, match=name.partition(":")[0]):
            choose_device(name)

    def test_prefers_cuda_to_mps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device() == torch.device("mps")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert choose_device() == torch.device("cuda")

    @pytest.mark.parametrize(
        "error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to"), MemoryError()]
    )
    def test_memory_errors_become_a_sentence(self, error: Exception) -> None:
        class Full(nn.Module):
            def forward(self, slices: Tensor) -> Tensor:
                raise error

        with pytest.raises(DeviceError, match="enough memory"):
            WMHInferenceEngine(Full(), "cpu").predict(head()[0])

    def test_other_errors_stay_what_they_are(self) -> None:
        class Broken(nn.Module):
            def forward(self, slices: Tensor) -> Tensor:
                raise RuntimeError("shapes do not fit")

        with pytest.raises(RuntimeError, match="shapes do not fit"):
            WMHInferenceEngine(Broken(), "cpu").predict(head()[0])


@pytest.mark.parametrize("channels", [1, 5])
def test_networks_are_shown_as_many_slices_as_they_take(channels: int) -> None:
    class Middle(nn.Module):
        def forward(self, slices: torch.Tensor) -> torch.Tensor:
            assert slices.shape[1] == channels
            logits = 40.0 * (slices[:, channels // 2, None] - 0.7)
            return torch.cat([logits, logits * 0.0 - 20.0, logits * 0.0 + 20.0], dim=1)

    flair, mask = head()
    three = brightness_model()
    card = replace(three.card, model=replace(three.card.model, in_channels=channels))
    found = WMHInferenceEngine(replace(three, net=Middle(), card=card), "cpu").segment(flair)
    expected = WMHInferenceEngine(three, "cpu").segment(flair)
    assert found.mask[mask > 0].mean() > 0.9
    np.testing.assert_array_equal(found.mask, expected.mask)


class TestT1:
    def test_changes_what_the_network_sees_in_place(self) -> None:
        flair, mask = head()
        second = mask.copy()
        second[:, 25:] = 0
        assert 0 < second.sum() < mask.sum()
        engine = WMHInferenceEngine(t1_model(tta="flip"), "cpu")
        alone = engine.segment(flair)
        both = engine.segment(flair, t1=t1_of_head(flair, second))
        assert alone.mask[mask > 0].mean() > 0.9
        assert both.mask[(mask > 0) & (second == 0)].mean() > 0.9
        assert both.mask[second > 0].mean() < 0.1
        assert (alone.settings["t1"], both.settings["t1"]) == (False, True)

    def test_a_model_of_flair_alone_says_so(self) -> None:
        flair, _ = head()
        with pytest.raises(ConfigError, match="takes FLAIR alone"):
            WMHInferenceEngine(brightness_model(), "cpu").segment(flair, t1=flair)

    def test_another_place_is_refused(self) -> None:
        flair, mask = head()
        t1 = t1_of_head(flair, mask)
        t1.affine[:3, 3] += 150.0
        with pytest.raises(GridMismatchError, match="--register-t1"):
            WMHInferenceEngine(t1_model(tta="flip"), "cpu").segment(flair, t1=t1)
