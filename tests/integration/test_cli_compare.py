"""``wmh-lora compare``: from labelled scans to the table, whatever happens on the way."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from tests.comparison_scans import write_comparison_scans
from wmh_lora.cli.main import cli
from wmh_lora.comparators.methods import fit
from wmh_lora.volume import Volume, write_nifti

METHODS = ["compact", "unet-2d", "dynunet-t1", "threshold"]


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """Give torch its threads back afterwards."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _compare(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison_scans(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def finished(config_file: Path) -> tuple[Path, Result]:
    """A whole comparison, which was interrupted in its second fold."""
    out = config_file.parent / "out"
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(task: Any) -> Any:
            if task.fold.name == "fold-2" and task.name == "unet-2d":
                raise KeyboardInterrupt
            return fit(task)

        patch.setattr("wmh_lora.comparators.run.fit", interrupted)
        stopped = _compare(config_file, "-o", out)
        assert stopped.exit_code != 0
        assert json.loads((out / "comparison.json").read_text())["methods"][0]["scans"] == 2
        before = {path: path.read_bytes() for path in out.glob("folds/*/*/result.json")}
        assert len(before) == 5
        trained: list[tuple[str, str]] = []

        def noted(task: Any) -> Any:
            trained.append((task.fold.name, task.name))
            return fit(task)

        patch.setattr("wmh_lora.comparators.run.fit", noted)
        result = _compare(config_file, "-o", out, "--resume")
    assert result.exit_code == 0, result.output
    assert trained == [("fold-2", name) for name in METHODS[1:]]
    assert all(path.read_bytes() == content for path, content in before.items())
    return out, result


def test_the_table_holds_every_method(finished: tuple[Path, Result]) -> None:
    out, result = finished
    document = json.loads((out / "comparison.json").read_text())
    rows = {row["method"]: row for row in document["methods"]}
    assert list(rows) == METHODS
    for name, row in rows.items():
        assert row["scans"] == row["subjects"] == 2
        assert len(row["folds"]) == 2
        trained = name != "threshold"
        assert (row["parameters"] > 0) == trained
        assert (row["training_seconds"] > 0.2) == trained
        assert row["inference_seconds"] > 0
    assert rows["unet-2d"]["members"] == 2
    # the phantom's lesions are far brighter than all else
    assert rows["threshold"]["dice"] > 0.8
    assert document["against"] == "compact"
    pairs = {(row["method"], row["measure"]) for row in document["differences"]}
    assert len(pairs) == 3 * 4
    table = (out / "comparison.md").read_text()
    assert table in result.stdout
    for word in (*METHODS, "CPU s a fold", "Dice", "HD95 (mm)", "Lesion F1", "Volume bias (mL)"):
        assert word in table
    assert "Small sample" in table
    assert str(out.parent) not in table


def test_every_scan_keeps_its_row_and_its_mask(finished: tuple[Path, Result]) -> None:
    out, _ = finished
    with (out / "cases.tsv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert len(rows) == len(METHODS) * 2
    assert {row["series"] for row in rows} == set(METHODS)
    for row in rows:
        assert (out / "masks" / row["series"] / row["prediction"]).is_file()
    with (out / "comparison.tsv").open(encoding="utf-8") as stream:
        table = list(csv.DictReader(stream, delimiter="\t"))
    own = [float(row["dice"]) for row in rows if row["series"] == "threshold"]
    assert float(table[-1]["dice"]) == pytest.approx(np.mean(own), rel=1e-4)


def test_folders_of_masks_give_the_same_numbers(
    finished: tuple[Path, Result], config_file: Path, tmp_path: Path
) -> None:
    out, _ = finished
    reference = tmp_path / "reference"
    reference.mkdir()
    for mask in (out / "masks" / "threshold").glob("*.nii.gz"):
        subject = mask.name.split("_")[0]
        found = next((config_file.parent / "scans").rglob(f"{subject}_label-WMH_mask.nii.gz"))
        shutil.copy(found, reference / f"{subject}_mask.nii.gz")
    folders = [f"--prediction={n}={out / 'masks' / n}" for n in ("threshold", "compact")]
    arguments = (*folders, "--reference", reference, "-o", tmp_path / "out")
    result = _compare(*arguments)
    assert result.exit_code == 0, result.output
    here = json.loads((tmp_path / "out" / "comparison.json").read_text())
    there = json.loads((out / "comparison.json").read_text())
    before = {row["method"]: row for row in there["methods"]}
    for row in here["methods"]:
        for key in ("dice", "hd95_mm", "lesion_f1", "volume_bias_ml", "dice_interval"):
            assert row[key] == before[row["method"]][key]
        assert row["parameters"] is None
    assert "n/a" in result.stdout
    assert _compare(*arguments).exit_code == 2  # not overwritten
    assert _compare(*arguments, "--overwrite", "--against", "compact").exit_code == 0


def test_other_programs_enter_the_same_table(
    finished: tuple[Path, Result], config_file: Path, tmp_path: Path
) -> None:
    out, _ = finished
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for mask in (config_file.parent / "scans").rglob("*_label-WMH_mask.nii.gz"):
        volume = Volume.read(mask)
        write_nifti(theirs / mask.name, volume.data.astype(np.uint8), volume)
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    result = _compare(config_file, "-o", copy, "--resume", f"--prediction=rater={theirs}")
    assert result.exit_code == 0, result.output
    document = json.loads((copy / "comparison.json").read_text())
    row = document["methods"][-1]
    assert (row["method"], row["dice"], row["scans"]) == ("rater", 1.0, 3)
    difference = next(
        r for r in document["differences"] if (r["method"], r["measure"]) == ("rater", "dice")
    )
    compact = document["methods"][0]["dice"]
    assert difference["scans"] == 2
    assert difference["mean_difference"] == pytest.approx(1 - compact, abs=1e-6)
    assert "different numbers of scans" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "messages"),
    [
        (["--set", 'comparison.methods=["dynunet-t2"]'], 2, ["did you mean 'dynunet-t1'?"]),
        (["--set", 'comparison.folds=["fold-8"]'], 2, ["fold-8", "fold-1"]),
        (["--set", "training.crop=36"], 2, ["training.crop = 36", "compact", "multiples of 8"]),
        (["--set", "methods.compact.model.t1_channels=1"], 2, ["t1_channels"]),
        (["--against", "unetr"], 2, ["unetr", "compact"]),
        (["--prediction", "threshold=."], 2, ["threshold"]),
        (["--prediction", "nowhere"], 2, ["NAME=DIR"]),
    ],
)
def test_wrong_usage(
    config_file: Path, tmp_path: Path, arguments: list[str], code: int, messages: list[str]
) -> None:
    result = _compare(config_file, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == code, result.output
    assert all(message in result.output for message in messages), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("configured", [True, False])
def test_an_unknown_method_is_told_before_any_mask_is_scored(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: bool
) -> None:
    monkeypatch.setattr("wmh_lora.evaluation.cohort.pair_folders", None)  # nobody may call it
    masks = tmp_path / "masks"
    masks.mkdir()
    words: list[object] = ["--prediction", f"other={masks}", "--against", "unknown"]
    words += [config_file] if configured else ["--reference", masks]
    result = _compare(*words, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "There is no method 'unknown' to compare with" in result.output
    assert "other." in result.output


def test_settings_need_a_configuration(tmp_path: Path) -> None:
    masks = f"other={tmp_path}"
    words = ("--prediction", masks, "--reference", tmp_path, "--set", "training.crop=64")
    result = _compare(*words, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--set changes a configuration" in result.output


def test_results_are_not_mixed_with_those_of_other_settings(
    finished: tuple[Path, Result], config_file: Path
) -> None:
    out, _ = finished
    again = _compare(config_file, "-o", out)
    assert again.exit_code == 2
    assert "--resume" in again.output
    changes = ("comparison.seconds=9", "methods.threshold.k=[2]", "preprocess.margin_mm=4")
    options = [word for change in changes for word in ("--set", change)]
    result = _compare(config_file, "-o", out, "--resume", *options)
    assert result.exit_code == 2
    for name in ("comparison.seconds", "methods.threshold", "preprocess.margin_mm"):
        assert name in result.output


def test_results_are_not_mixed_with_those_of_another_split(
    finished: tuple[Path, Result], config_file: Path
) -> None:
    out, _ = finished
    settings = out / "config.json"
    before = settings.read_text()
    known = json.loads(before)
    assert known["identity"].keys() == {"data.manifest", "data.split"}
    known["identity"]["data.split"] = "0" * 64
    settings.write_text(json.dumps(known))
    result = _compare(config_file, "-o", out, "--resume")
    settings.write_text(before)
    assert result.exit_code == 2
    assert "data.split (its content)" in result.output


@pytest.mark.slow
def test_a_killed_comparison_goes_on(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = "from wmh_lora.cli.compare import compare; compare()"
    overrides = ['comparison.methods=["compact", "unet-2d"]', "comparison.seconds=3"]
    options = [word for change in overrides for word in ("--set", change)]
    command = [sys.executable, "-c", call, str(config_file), "-o", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = out / "folds" / "fold-1" / "compact" / "result.json"
    with subprocess.Popen(command, env=environment) as process:
        deadline = time.monotonic() + 300
        while not first.exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    content = first.read_bytes()
    finished = subprocess.run([*command, "--resume"], env=environment, check=False)
    assert finished.returncode == 0
    assert first.read_bytes() == content
    assert len(list(out.glob("folds/*/*/result.json"))) == 4
