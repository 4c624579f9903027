"""`wmh-lora evaluate` end to end on small masks: files, pairing, exit codes, and bad input."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from wmh_lora.cli.main import cli
from wmh_lora.evaluation.metrics import evaluate
from wmh_lora.volume import Volume, write_nifti

SHAPE = (24, 20, 6)
GRID = Volume(np.zeros(SHAPE, np.float32), np.diag([1.0, 1.0, 3.0, 1.0]))
OURS = "_space-orig_label-WMH_mask.nii.gz"

Run = Callable[..., Result]


def blocks(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    for _ in range(3):
        i, j, k = (int(rng.integers(2, n - 4)) if n > 6 else int(rng.integers(0, 4)) for n in SHAPE)
        mask[i : i + 4, j : j + 3, k : k + 2] = 1
    return mask


def write(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, mask, GRID)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Five subjects in BIDS, two methods, and their images."""
    for n in range(1, 6):
        stem, mask = f"sub-0{n}", blocks(n)
        write(tmp_path / "ref" / stem / "anat" / f"{stem}_label-WMH_mask.nii.gz", mask)
        write(tmp_path / "a" / f"{stem}{OURS}", np.roll(mask, 1, 0))
        write(tmp_path / "b" / f"{stem}{OURS}", np.roll(mask, 1, 1))
        image = np.random.default_rng(n).random(SHAPE).astype(np.float32)
        write(tmp_path / "images" / f"{stem}_FLAIR.nii.gz", image)
    return tmp_path


@pytest.fixture(autouse=True)
def _coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering for print takes time, and shows nothing that is tested here."""
    if find_spec("matplotlib") is not None:
        monkeypatch.setattr("wmh_lora.report.figures._PRINT_DPI", 40)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the command into tmp_path/out; paths below tmp_path begin with @."""

    def invoke(*arguments: str) -> Result:
        full = [str(tmp_path / a[1:]) if a.startswith("@") else a for a in arguments]
        result = CliRunner().invoke(cli, ["evaluate", *full, "-o", str(tmp_path / "out")])
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


PLAIN = ("--prediction", "@a", "--reference", "@ref", "--no-figures")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "cases.tsv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def document(folder: Path) -> dict[str, Any]:
    text = (folder / "out" / "evaluation.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def test_scores_and_files(cohort: Path, run: Run) -> None:
    result = run(*PLAIN)
    assert result.exit_code == 0, result.output
    assert {path.name for path in (cohort / "out").iterdir()} == {
        "cases.tsv",
        "cases.json",
        "evaluation.json",
        "report.md",
    }
    table = rows(cohort)
    assert [row["subject"] for row in table] == ["01", "02", "03", "04", "05"]
    expected = evaluate(blocks(3), np.roll(blocks(3), 1, 0), GRID.spacing_mm)
    for key, value in expected.to_dict().items():
        assert float(table[2][key]) == pytest.approx(value, rel=1e-5)
    dictionary = json.loads((cohort / "out" / "cases.json").read_text(encoding="utf-8"))
    assert list(dictionary) != []
    assert set(dictionary) == set(table[0])
    assert "a: 5 scans, Dice" in result.stdout


def test_results_repeat_and_name_no_place_on_disk(cohort: Path, run: Run) -> None:
    names = ("cases.tsv", "evaluation.json", "report.md")
    run(*PLAIN)
    first = [(cohort / "out" / name).read_bytes() for name in names]
    assert run(*PLAIN, "--overwrite", "--jobs", "1").exit_code == 0
    assert first == [(cohort / "out" / name).read_bytes() for name in names]
    assert not any(str(cohort).encode() in content for content in first)


def test_results_are_not_overwritten(cohort: Path, run: Run) -> None:
    run(*PLAIN)
    result = run(*PLAIN)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr


def test_figures(cohort: Path, run: Run) -> None:
    (cohort / "participants.tsv").write_text("participant_id\tsite\nsub-01\tOslo\nsub-02\tOslo\n")
    result = run(*PLAIN[:4], "--images", "@images", "--participants", "@participants.tsv")
    assert result.exit_code == 0, result.output
    stems = ("bland_altman", "correlation", "groups", "predictions")
    figures = {path.name for path in (cohort / "out" / "figures").iterdir()}
    assert figures == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    report = (cohort / "out" / "report.md").read_text(encoding="utf-8")
    assert "](figures/predictions.png)" in report
    assert "| Oslo " in report


def test_an_image_that_cannot_be_shown_does_not_stop_the_rest(cohort: Path, run: Run) -> None:
    (cohort / "images" / "sub-02_FLAIR.nii.gz").write_bytes(b"no image")
    result = run(*PLAIN[:4], "--images", "@images", "--case", "02")
    assert result.exit_code == 1
    assert "sub-02_FLAIR" in result.stderr
    assert len(rows(cohort)) == 5


def test_a_name_of_no_scan_does_not_stop_the_rest(cohort: Path, run: Run) -> None:
    result = run(*PLAIN[:4], "--images", "@images", "--case", "nobody", "--case", "01")
    assert result.exit_code == 1
    assert "nobody" in result.stderr
    assert "There are: 01" in result.stderr
    assert len(rows(cohort)) == 5
    assert (cohort / "out" / "figures" / "predictions.png").is_file()


def test_without_matplotlib(cohort: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(*PLAIN[:4])
    assert result.exit_code == 2
    assert "pip install 'wmh-lora[evaluate]'" in result.stderr
    assert run(*PLAIN).exit_code == 0


def test_two_methods(cohort: Path, run: Run) -> None:
    result = run(*PLAIN, "--compare", "@b", "--names", "first", "second")
    assert result.exit_code == 0, result.output
    comparison = document(cohort)["comparison"]
    assert (comparison["first"], comparison["second"]) == ("first", "second")
    by_name = {row["scan"] + row["series"]: float(row["dice"]) for row in rows(cohort)}
    difference = np.mean([by_name[f"0{n}second"] - by_name[f"0{n}first"] for n in range(1, 6)])
    assert comparison["rows"][0]["mean_difference"] == pytest.approx(difference, abs=1e-5)
    report = (cohort / "out" / "report.md").read_text(encoding="utf-8")
    assert "**Small sample.**" in report


def test_a_method_against_itself(cohort: Path, run: Run) -> None:
    assert run(*PLAIN, "--compare", "@a", "--names", "x", "y").exit_code == 0
    (row, *_) = document(cohort)["comparison"]["rows"]
    assert (row["p_value"], row["rank_biserial"], row["mean_difference"]) == (1.0, 0.0, 0.0)
    report = (cohort / "out" / "report.md").read_text(encoding="utf-8")
    assert "there is nothing to test" in report


def test_several_cohorts(cohort: Path, run: Run) -> None:
    arguments = ("--dataset", "North", "@a", "@ref", "--dataset", "South", "@b", "@ref")
    assert run(*arguments, "--no-figures").exit_code == 0
    found = document(cohort)
    assert [entry["series"] for entry in found["series"]] == ["North", "South"]
    means = {
        row["series"]: row["mean"]
        for row in found["summary"]
        if row["group"] == "overall" and row["measure"] == "dice"
    }
    shift = found["domain_shift"][0]
    assert shift["difference"] == pytest.approx(means["South"] - means["North"])
    assert shift["interval"][0] <= shift["difference"] <= shift["interval"][1]


def test_a_cohort_without_pairs_does_not_stop_the_others(cohort: Path, run: Run) -> None:
    (cohort / "empty").mkdir()
    arguments = ("--dataset", "North", "@a", "@ref", "--dataset", "None", "@empty", "@ref")
    result = run(*arguments, "--no-figures")
    assert result.exit_code == 1
    assert "empty" in result.stderr
    assert len(rows(cohort)) == 5


def test_bad_files_are_told_and_the_rest_is_done(cohort: Path, run: Run) -> None:
    (cohort / "a" / f"sub-01{OURS}").write_bytes(b"damaged")
    (cohort / "a" / f"sub-02{OURS}").unlink()
    reference = cohort / "ref" / "sub-03" / "anat" / "sub-03_label-WMH_mask.nii.gz"
    write_nifti(reference, blocks(3) * 7, GRID, overwrite=True)
    small = Volume(np.zeros((24, 20, 5), np.float32), GRID.affine)
    write_nifti(cohort / "a" / f"sub-04{OURS}", small.data, small, overwrite=True)
    result = run(*PLAIN)
    assert result.exit_code == 1
    table = {row["subject"]: row for row in rows(cohort)}
    assert {subject: row["status"] for subject, row in table.items()} == {
        "01": "failed",
        "03": "failed",
        "04": "failed",
        "05": "done",
    }
    assert "values 7;" in table["03"]["message"]
    assert "(24, 20, 5)" in table["04"]["message"]
    assert document(cohort)["unpaired"][0]["file"].endswith("sub-02_label-WMH_mask.nii.gz")
    assert "3 failed and 1 unpaired" in result.stderr
    report = (cohort / "out" / "report.md").read_text(encoding="utf-8")
    assert "no counterpart" in report


def test_nothing_can_be_scored(cohort: Path, run: Run) -> None:
    for path in (cohort / "a").iterdir():
        path.write_bytes(b"damaged")
    result = run(*PLAIN)
    assert result.exit_code == 1
    assert "nothing is written" in result.stderr
    assert not (cohort / "out").exists()


def test_empty_masks_are_undefined_and_not_zero(cohort: Path, run: Run) -> None:
    for folder, name in (
        ("a", f"sub-01{OURS}"),
        ("ref/sub-01/anat", "sub-01_label-WMH_mask.nii.gz"),
    ):
        write_nifti(cohort / folder / name, np.zeros(SHAPE, np.uint8), GRID, overwrite=True)
    assert run(*PLAIN).exit_code == 0
    row = rows(cohort)[0]
    assert (row["dice"], row["hd95_mm"], row["avd_percent"]) == ("n/a", "n/a", "n/a")
    assert (row["lesion_recall"], row["lesion_f1"]) == ("1", "1")
    overall = document(cohort)["summary"][0]
    assert (overall["scans"], overall["undefined"]) == (4, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--prediction", "@a"),
        ("--prediction", "@a", "--reference", "@gone"),
        ("--prediction", "@a", "--reference", "@ref", "--names", "x", "y"),
        ("--prediction", "@a", "--reference", "@ref", "--compare", "@a"),
        ("--dataset", "x", "@a", "@ref", "--prediction", "@a"),
        ("--dataset", "x", "@a", "@ref", "--dataset", "x", "@b", "@ref"),
        (*PLAIN, "--images", "@images", "--images", "@images"),
        (*PLAIN, "--layout", "oasis"),
    ],
)
def test_wrong_usage(cohort: Path, run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert not (cohort / "out").exists()


def test_json(cohort: Path, run: Run) -> None:
    result = run(*PLAIN, "--json")
    assert json.loads(result.stdout) == document(cohort)
