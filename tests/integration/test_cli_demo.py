"""`wmh-lora demo`: makes its own scan, segments it like any other, and scores it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.phantoms import brightness_model, head
from wmh_lora.cli.main import cli
from wmh_lora.errors import WeightsError
from wmh_lora.volume import Volume

FILES = {
    "demo_FLAIR.nii.gz",
    "demo_space-orig_label-WMH_desc-reference_mask.nii.gz",
    "demo_space-orig_label-WMH_mask.nii.gz",
    "demo_space-orig_label-WMH_probseg.nii.gz",
    "demo_wmh.json",
    "demo_wmh.png",
    "demo_wmh.html",
}


@pytest.fixture(autouse=True)
def _phantom(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small scan in place of the synthetic one, which takes seconds to make."""

    def small_case(seed: int) -> tuple[object, object, object]:
        volume, mask = head(seed)
        return volume.data, volume.affine, mask

    monkeypatch.setattr("wmh_lora.data.synthesis.demo_case", small_case)
    monkeypatch.setattr("wmh_lora.engine.load_model", lambda name, **_: brightness_model())


def test_makes_segments_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["demo", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    out = tmp_path / "wmh-lora-demo"
    assert {path.name for path in out.iterdir()} == FILES
    assert "Dice              1.000" in result.stdout
    assert "4.48 mL found, 4.48 mL there" in result.stdout
    assert "demo_wmh.png" in result.stdout
    # the phantom's coarse voxels do not pass
    assert all(": quality " in line for line in result.stderr.splitlines())


def test_runs_again_and_leaves_other_files_alone(tmp_path: Path) -> None:
    arguments = ["demo", "-o", str(tmp_path), "--device", "cpu"]
    (tmp_path / "mine.txt").write_text("mine")
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    first = Volume.read(tmp_path / "demo_FLAIR.nii.gz").data
    assert CliRunner().invoke(cli, [*arguments, "--seed", "1"]).exit_code == 0
    second = Volume.read(tmp_path / "demo_FLAIR.nii.gz").data
    assert not np.array_equal(first, second)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"mine.txt"}


def test_absent_weights_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, **_: object) -> None:
        raise WeightsError("The base weights are absent; run `wmh-lora models pull litemedsam`.")

    monkeypatch.setattr("wmh_lora.engine.load_model", absent)
    result = CliRunner().invoke(cli, ["demo", "-o", str(tmp_path / "out"), "--device", "cpu"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
