"""``wmh-lora tune`` from a run folder to a model whose masks are those that were scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tests.phantoms import head, write_head
from wmh_lora import segment
from wmh_lora.cli.main import cli
from wmh_lora.config import InferenceConfig, ModelConfig, PreprocessConfig
from wmh_lora.config_reading import to_dict
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.evaluation.metrics import evaluate
from wmh_lora.models.model_file import (
    ModelCard,
    file_sha256,
    load_model_file,
    read_model_card,
    save_model,
    weights_sha256,
)
from wmh_lora.models.network import build_network
from wmh_lora.training.settings import RunConfig, ValidationCase
from wmh_lora.volume import Volume, write_nifti

MODEL = ModelConfig(
    encoder="compact", adaptation="full", decoder_channels=(8, 8, 8, 8), structures=("wmh",)
)
PREPROCESS = PreprocessConfig(pixel_size_mm=4.0, margin_mm=8.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nobody has trained: its maps are smooth noise, which will do."""
    net = build_network(MODEL, None, for_training=True, seed=3)
    card = ModelCard(
        name="run", model=MODEL, preprocess=PREPROCESS, inference=InferenceConfig(), base_sha256=""
    )
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    save_model(path, net, card)
    return path


def _write_labels(path: Path) -> None:
    volume, mask = head()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, mask, volume)


@pytest.fixture
def run(tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with two labelled scans and a healthy one, beside its data."""
    cases = []
    for seed, name in enumerate(("sub-1", "sub-2", "healthy")):
        write_head(tmp_path / f"data/{name}_FLAIR.nii.gz", seed)
        _write_labels(tmp_path / f"data/{name}_mask.nii.gz")
        reference = "" if name == "healthy" else f"{name}_mask.nii.gz"
        cases.append(ValidationCase(f"{name}_FLAIR.nii.gz", reference, name))
    folder = tmp_path / "run"
    folder.mkdir()
    config = RunConfig(MODEL, PREPROCESS, data={"root": "data"}, validation=tuple(cases))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "best.safetensors").write_bytes(trained.read_bytes())
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return folder


def _tune(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["tune", *map(str, arguments)])


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "tuning.tsv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_the_tuned_model_makes_the_masks_that_were_scored(run: Path) -> None:
    model = run / "best.safetensors"
    weights, (_, tensors) = weights_sha256(model), load_model_file(model)
    result = _tune(run, "--thresholds", "0.1:0.9:0.1", "--min-voxels", "1,3,8")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == [str(model), str(run / "tuning" / "tuning.md")]
    assert "2 subjects with lesions and 1 scan without" in result.stdout
    assert "Leave-one-out" in result.stdout
    assert "Caution" in result.stdout

    assert weights_sha256(model) == weights
    for name, tensor in load_model_file(model)[1].items():
        assert torch.equal(tensor, tensors[name])
    card = read_model_card(model)
    [chosen] = [row for row in _rows(run / "tuning") if row["mark"] == "chosen"]
    assert card.inference == InferenceConfig(
        threshold=float(chosen["threshold"]),
        min_voxels=int(chosen["min_voxels"]),
        tta=chosen["tta"],  # type: ignore[arg-type]
    )
    assert card.training["tuning"]["subjects"] == 2

    # A user's masks with the settings of the file, nothing given, score what the table says.
    scores, found_ml = [], 0.0
    for name in ("sub-1", "sub-2", "healthy"):
        found = segment(f"data/{name}_FLAIR.nii.gz", model=model, device="cpu")
        if name == "healthy":
            found_ml = found.volume_ml
        else:
            labels = Volume.read(f"data/{name}_mask.nii.gz").data
            scores.append(evaluate(labels, found.mask, found.volume.spacing_mm))
    assert float(chosen["mean"]) == pytest.approx(np.mean([s.dice for s in scores]), rel=1e-5)
    assert float(chosen["lesion_f1"]) == pytest.approx(
        np.mean([s.lesion_f1 for s in scores]), rel=1e-5
    )
    assert float(chosen["false_positive_ml"]) == pytest.approx(found_ml, rel=1e-5)
    assert read_model_card(model).metrics["tuned_dice"] == pytest.approx(
        float(chosen["mean"]), abs=1e-4
    )

    document = json.loads((run / "tuning" / "tuning.json").read_text())
    assert document["chosen"]["threshold"] == card.inference.threshold
    assert len(document["per_subject"]) == 2
    assert (run / "tuning" / "threshold.png").read_bytes().startswith(b"\x89PNG")
    report = (run / "tuning" / "tuning.md").read_text()
    assert "sub-1" in report
    assert "nan" not in report


def test_a_second_search_needs_no_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _tune(run, "--no-tta").exit_code == 0
    before = file_sha256(run / "best.safetensors")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(WMHInferenceEngine, "predict", refuse)
    again = _tune(run, "--no-tta")
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    again = _tune(run, "--no-tta", "--overwrite", "--metric", "f1", "--thresholds", "0.2:0.4:0.1")
    assert again.exit_code == 0, again.output
    assert file_sha256(run / "best.safetensors") != before
    assert {row["threshold"] for row in _rows(run / "tuning")} >= {"0.2", "0.3", "0.4"}
    assert {row["tta"] for row in _rows(run / "tuning")} == {"none"}


def test_a_dry_run_prints_only_and_needs_no_matplotlib(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_sha256(run / "best.safetensors")
    monkeypatch.setattr("wmh_lora.report.extras.find_spec", lambda _: None)
    refused = _tune(run, "--no-tta")
    assert refused.exit_code == 2
    assert "wmh-lora[evaluate]" in refused.output
    assert not (run / "tuning").exists()
    result = _tune(run, "--no-tta", "--dry-run", "--thresholds", "0.3,0.6")
    assert result.exit_code == 0, result.output
    assert "chosen" in result.stdout
    assert file_sha256(run / "best.safetensors") == before
    assert [path.name for path in (run / "tuning").iterdir()] == ["maps"]


def test_a_model_file_with_folders_or_a_split(run: Path, tmp_path: Path) -> None:
    model = run / "best.safetensors"
    common = ("--no-tta", "--thresholds", "0.3,0.6", "--min-voxels", "1,3")
    for name in ("sub-1", "sub-2"):
        write_head(tmp_path / f"images/{name}_FLAIR.nii.gz")
        _write_labels(tmp_path / f"masks/{name}_label-WMH_mask.nii.gz")
    result = _tune(
        *(model, "--images", "images", "--references", "masks", *common),
        *("--save-as", "tuned.safetensors", "-o", "report"),
    )
    assert result.exit_code == 0, result.output
    assert "2 subjects" in result.stdout
    assert read_model_card(model).training == {}
    assert read_model_card("tuned.safetensors").training["tuning"]["scans"] == 2
    assert weights_sha256("tuned.safetensors") == weights_sha256(model)
    assert (tmp_path / "report" / "tuning.md").is_file()

    for name in ("sub-1", "sub-2", "sub-3"):
        write_head(tmp_path / f"flat/{name}_FLAIR.nii.gz", int(name[-1]))
        _write_labels(tmp_path / f"flat/{name}_mask.nii.gz")
    for command in (
        ["data", "prepare", "flat", "-o", "manifest.json"],
        [
            "data",
            "split",
            "manifest.json",
            "-o",
            "split.json",
            "--fractions",
            "0.34",
            "0.33",
            "0.33",
        ],
    ):
        made = CliRunner().invoke(cli, command)
        assert made.exit_code == 0, made.output
    result = _tune(model, "--manifest", "manifest.json", "--split", "split.json", *common)
    assert result.exit_code == 0, result.output
    assert "1 subject with lesions" in result.stdout
    assert "No unbiased estimate" in result.stdout
    assert (tmp_path / "best-tuning" / "tuning.md").is_file()


def test_wrong_use_ends_with_exit_code_2_and_changes_nothing(run: Path) -> None:
    model = run / "best.safetensors"
    before = file_sha256(model)
    for arguments, message in (
        ((run, "--checkpoint", "last"), "last.safetensors"),
        ((model,), "--images"),
        ((model, "--images", "data"), "--references"),
        ((run, "--thresholds", "0.5,none"), "0.5,none"),
        ((run, "--thresholds", "0.5:0.1:0.1"), "FIRST:LAST:STEP"),
        ((run, "--thresholds", "0.5,1.5"), "threshold"),
        ((run, "--data-root", "run"), "--data-root"),
        (("default", "--images", "data", "--references", "data"), "--save-as"),
        (("nothing", "--dry-run"), "nothing"),
    ):
        result = _tune(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.output, (arguments, result.output)
        assert "Traceback" not in result.output
    assert not list(Path().glob("*-tuning"))
    (Path("data") / "sub-2_mask.nii.gz").write_bytes(b"damaged")
    result = _tune(run, "--no-tta")
    assert result.exit_code == 1
    assert "sub-2_mask" in result.output
    assert file_sha256(model) == before
    assert not list((run / "tuning").glob("tuning*"))
