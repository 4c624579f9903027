"""The MONAI bundle: MONAI reads and runs it, and the engine gives the source's masks."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tests.phantoms import write_head
from tests.small_models import small_model
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.errors import WeightsError
from wmh_lora.models.export import export_model
from wmh_lora.models.export_bundle import is_bundle, load_bundle
from wmh_lora.volume import Volume

MODEL = small_model()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "small"
    export_model(MODEL, folder, "monai-bundle")
    return folder


def test_layout(bundle: Path) -> None:
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE",
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "models/model.ts",
    }
    metadata = json.loads((bundle / "configs/metadata.json").read_text())
    output = metadata["network_data_format"]["outputs"]["pred"]
    assert output["channel_def"] == {"0": "wmh", "1": "brain"}
    assert output["spatial_shape"] == ["16*n", "16*n"]
    licence = (bundle / "LICENSE").read_text()
    assert "MIT" in licence
    assert "Apache-2.0" in licence


# MONAI itself loads "network_def" by a function that PyTorch calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.load:DeprecationWarning")
def test_monai_runs_it_on_a_scan(bundle: Path, tmp_path: Path) -> None:
    from monai.bundle.config_parser import ConfigParser

    path = write_head(tmp_path / "sub-01_FLAIR.nii.gz")
    parser = ConfigParser()
    parser.read_config(bundle / "configs/inference.json")
    parser.read_meta(bundle / "configs/metadata.json")
    parser["bundle_root"] = str(bundle)
    parser["scan"] = str(path)
    parser["output_dir"] = str(tmp_path / "out")
    parser["device"] = "cpu"
    assert parser.get_parsed_content("network_def") is not None
    parser.get_parsed_content("run")
    saved = nib.nifti1.load(tmp_path / "out/sub-01_space-orig_label-WMH_probseg.nii.gz")
    expected = WMHInferenceEngine(MODEL, "cpu").predict(Volume.read(path))
    assert expected.max() - expected[expected > 0].min() > 0.1, "the comparison would show nothing"
    np.testing.assert_allclose(np.asarray(saved.dataobj), expected, rtol=0, atol=2.1 / 4096)


def test_model_comes_back(bundle: Path) -> None:
    model = load_bundle(bundle)
    assert model.card == MODEL.card
    assert (model.sha256, model.path) == (MODEL.sha256, bundle)


def test_damage_is_reported(bundle: Path, tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    with pytest.raises(WeightsError, match="not a complete bundle"):
        load_bundle(tmp_path)
    copy = tmp_path / "copy"
    (copy / "configs").mkdir(parents=True)
    (copy / "models").mkdir()
    (copy / "configs/metadata.json").write_text((bundle / "configs/metadata.json").read_text())
    (copy / "models/model.ts").write_bytes(b"no network")
    with pytest.raises(WeightsError, match="PyTorch cannot read"):
        load_bundle(copy)
    (copy / "configs/metadata.json").write_text('{"wmh_lora": {"card": {}}}')
    with pytest.raises(WeightsError, match="cannot be read"):
        load_bundle(copy)
