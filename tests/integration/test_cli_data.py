"""`wmh-lora data`: from a folder of scans to a manifest and a split, as somebody would type it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.phantoms import head
from wmh_lora.cli.main import cli
from wmh_lora.data.manifest import read_manifest
from wmh_lora.data.split import read_split
from wmh_lora.volume import Volume, write_nifti


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["data", *map(str, arguments)])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of the challenge with six subjects each."""
    root = tmp_path_factory.mktemp("cohort")
    for number in range(12):
        folder = root / "training" / ("Utrecht", "Singapore")[number % 2] / str(number)
        volume, mask = head(number)
        (folder / "pre").mkdir(parents=True)
        write_nifti(folder / "pre" / "FLAIR.nii.gz", volume.data, volume)
        write_nifti(folder / "wmh.nii.gz", mask, volume)
    return root


def test_prepare_then_split(cohort: Path, tmp_path: Path) -> None:
    table, split = tmp_path / "manifest.json", tmp_path / "split.json"
    prepared = run("prepare", cohort, "-o", table)
    assert prepared.exit_code == 0, prepared.output
    assert "12 scans of 12 subjects, 12 usable (layout challenge)" in prepared.stdout
    assert prepared.stderr == ""

    divided = run("split", table, "-o", split)
    assert divided.exit_code == 0, divided.output
    manifest = read_manifest(table)
    made = read_split(split, manifest).split()
    assert [len(made.train), len(made.validation), len(made.test)] == [8, 2, 2]

    assert run("split", table, "-o", tmp_path / "again.json").exit_code == 0
    assert (tmp_path / "again.json").read_bytes() == split.read_bytes()
    assert run("split", table, "-o", tmp_path / "folds.json", "--folds", 3).exit_code == 0
    sites = run("split", table, "-o", tmp_path / "sites.json", "--leave-one-site-out")
    assert "without-Utrecht" in sites.stdout


def test_the_same_in_a_process_of_its_own(cohort: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.json", tmp_path / "there.json"
    assert run("prepare", cohort, "-o", here).exit_code == 0
    command = [sys.executable, "-m", "wmh_lora", "data", "prepare", str(cohort), "-o", str(there)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    assert here.read_bytes() == there.read_bytes()


def test_scans_that_cannot_be_used_are_told_and_kept(tmp_path: Path) -> None:
    volume, mask = head()
    for name in ("a", "b"):
        write_nifti(tmp_path / f"{name}_FLAIR.nii.gz", volume.data, volume)
    write_nifti(tmp_path / "a_mask.nii.gz", mask, volume)
    write_nifti(tmp_path / "c_mask.nii.gz", mask, volume)
    result = run("prepare", tmp_path, "-o", tmp_path / "m.json")
    assert result.exit_code == 1
    assert "missing-mask (not usable), 1 scan: no reference mask was found for it" in result.stdout
    assert "duplicate-image (kept, please check), 2 scans:" in result.stdout
    assert "1 mask without an image: c_mask.nii.gz" in result.stdout
    usable = [s["usable"] for s in json.loads((tmp_path / "m.json").read_text())["scans"]]
    assert usable == [True, False]


def test_a_t1_that_cannot_be_used_does_not_count(tmp_path: Path) -> None:
    volume, mask = head()
    elsewhere = volume.affine.copy()
    elsewhere[0, 3] += 500.0
    for name, affine in (("a", volume.affine), ("b", elsewhere)):
        write_nifti(tmp_path / f"{name}_FLAIR.nii.gz", volume.data, volume)
        write_nifti(tmp_path / f"{name}_mask.nii.gz", mask, volume)
        write_nifti(tmp_path / f"{name}_T1.nii.gz", volume.data, Volume(volume.data, affine))
    result = run("prepare", tmp_path, "-o", tmp_path / "m.json")
    assert result.exit_code == 0, result.output
    head_line, row = (line.split("  ") for line in result.stdout.splitlines()[1:3])
    columns = [cell.strip() for cell in head_line if cell.strip()]
    counts = [cell.strip() for cell in row if cell.strip()]
    assert dict(zip(columns, counts))["with T1"] == "1"
    assert "t1-apart (kept, without the T1), 1 scan:" in result.stdout


def test_a_changed_file_stops_the_split(cohort: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    volume, mask = head()
    folder.mkdir()
    write_nifti(folder / "a_FLAIR.nii.gz", volume.data, volume)
    write_nifti(folder / "a_mask.nii.gz", mask, volume)
    assert run("prepare", folder, "-o", tmp_path / "m.json").exit_code == 0
    write_nifti(folder / "a_mask.nii.gz", 1 - mask, volume, overwrite=True)
    result = run("split", tmp_path / "m.json", "-o", tmp_path / "s.json")
    assert result.exit_code == 1
    assert "a_mask.nii.gz (changed)" in result.stderr
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "absent", "-o", "m.json"], "absent is not a folder; give the folder"),
        (["prepare", ".", "-o", "absent/m.json"], "absent is not an existing folder"),
        (["prepare", ".", "-o", "there.json"], "there.json exists already; add --overwrite"),
        (["prepare", ".", "-o", "m.json", "--layout", "x"], "'x' is not one of"),
        (["split", "m.json", "-o", "there.json"], "there.json exists already; add --overwrite"),
        (
            ["split", "m.json", "-o", "s.json", "--folds", "3", "--leave-one-site-out"],
            "--folds goes with neither",
        ),
        (["fetch", "other", "-o", "d"], "'other' is not 'wmh-challenge'"),
        (["fetch", "wmh-challenge", "-o", "d"], "add --accept-licence if you accept"),
        (
            ["fetch", "wmh-challenge", "-o", "d", "--source", "kaggle", "--accept-licence"],
            "--kaggle-dataset OWNER/NAME go together",
        ),
        (
            [
                "fetch",
                "wmh-challenge",
                "-o",
                "d",
                "--all",
                "--source=kaggle",
                "--kaggle-dataset=a/b",
            ],
            "--all is for --source dataverse",
        ),
    ],
)
def test_misuse_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("mine")
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_the_licence_is_shown_before_anything_is_fetched(tmp_path: Path) -> None:
    result = run("fetch", "wmh-challenge", "-o", tmp_path / "d")
    assert "CC BY-NC 4.0" in result.stderr
    assert "weights" in result.stderr
    assert not (tmp_path / "d").exists()
