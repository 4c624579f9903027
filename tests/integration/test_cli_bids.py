"""`wmh-lora bids` end to end: valid derivatives, resuming, bad scans, the group table."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests.bids_trees import errors_of, validate, warnings_of, write_dataset
from tests.phantoms import brightness_model, head, t1_model, t1_of_head
from wmh_lora.bids.discovery import find_flairs
from wmh_lora.bids.names import derived_files
from wmh_lora.cli.bids_run import RunOptions, describe_model
from wmh_lora.cli.main import cli
from wmh_lora.cli.options import Options
from wmh_lora.engine import load_model
from wmh_lora.errors import ConfigError
from wmh_lora.files import file_sha256
from wmh_lora.models.init import init_model
from wmh_lora.volume import Volume, write_nifti

SCANS = ("sub-01_ses-1_acq-3d_run-1", "sub-01_ses-1_acq-3d_run-2", "sub-01_ses-2", "sub-02_chunk-1")

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _phantom_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(options: RunOptions) -> tuple[dict[str, str], Any]:
        model = brightness_model()
        chosen = {k: v for k, v in options.inference.inference.items() if v is not None}
        return model.describe(), type(model.card.inference)(**chosen)

    monkeypatch.setattr("wmh_lora.engine.load_model", lambda name, **_: brightness_model())
    monkeypatch.setattr("wmh_lora.cli.bids_run.describe_model", describe)


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(cli, ["bids", *map(str, arguments), "--device", "cpu"])
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "raw", *(f"{scan}_FLAIR" for scan in SCANS))


@pytest.fixture
def run(root: Path, tmp_path: Path) -> Run:
    """Run the participant level on the phantoms, into tmp_path/out."""
    return lambda *options: invoke(root, tmp_path / "out", "participant", *options)


def files_below(folder: Path) -> dict[str, int]:
    """Every file, and when it was written."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in found}


def test_derivatives_and_table_are_valid_bids(root: Path) -> None:
    out = root / "derivatives" / "wmh-lora"
    result = invoke(root, out, "participant")
    assert result.exit_code == 0, result.output
    assert "[1/4] sub-01_ses-1_acq-3d_run-1: 4.48 mL in 2 lesions" in result.stdout
    assert "4 scans segmented, 0 finished before, 0 failed" in result.stdout
    group = invoke(root, out, "group")
    assert group.exit_code == 0, group.output

    issues = validate(out)
    assert errors_of(issues) == []
    assert warnings_of(issues) == {"TOO_FEW_AUTHORS"}  # who they are is for the user to say
    (out / ".bidsignore").unlink()  # the validator sees the files that it is told to leave out
    assert {line.split()[0] for line in errors_of(validate(out))} == {"NOT_INCLUDED"}

    _, lesions = head()
    scan = find_flairs(root).scans[0]
    mask = Volume.read(derived_files(out, scan.name).mask, allow_constant=True)
    np.testing.assert_array_equal(mask.data, lesions)
    np.testing.assert_array_equal(mask.affine, Volume.read(scan.source).affine)
    with (out / "wmh.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["scan"] for row in rows] == list(SCANS)
    assert {row["wmh_volume_ml"] for row in rows} == {"4.4800"}


def test_a_second_run_keeps_what_is_finished(run: Run, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # labels as BIDS-Apps take them: several after one option
    assert run("--participant-label", "01", "sub-02", "--session-id=1", "2").exit_code == 0
    first = files_below(out)
    assert sum(name.endswith("_mask.nii.gz") for name in first) == 3
    derived_files(out, find_flairs(root).scans[1].name).page.unlink()

    again = run()
    assert again.exit_code == 0, again.output
    assert "2 scans were finished before and are kept." in again.stdout
    assert "2 scans segmented, 2 finished before, 0 failed" in again.stdout
    second = files_below(out)
    kept = {name for name, time in first.items() if second.get(name) == time}
    assert {name for name in first if SCANS[0] in name or SCANS[2] in name} <= kept
    assert not {name for name in kept if SCANS[1] in name}

    third = run()
    assert "0 scans segmented, 4 finished before" in third.stdout
    assert files_below(out) == second


def test_other_settings_are_refused_and_replaced_on_request(run: Run, tmp_path: Path) -> None:
    one = ("--participant-label", "02")
    assert run(*one).exit_code == 0
    before = files_below(tmp_path / "out")
    refused = run(*one, "--threshold", "0.7")
    assert refused.exit_code == 2
    assert "sub-02_chunk-1 that were made with other settings" in refused.stderr
    assert files_below(tmp_path / "out") == before
    replaced = run(*one, "--threshold", "0.7", "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    after = files_below(tmp_path / "out")
    assert all(after[name] != before[name] for name in before if "anat" in name)


def test_a_bad_scan_does_not_stop_the_others(run: Run, root: Path, tmp_path: Path) -> None:
    bad = root / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_FLAIR.nii.gz"
    good = bad.read_bytes()
    bad.write_bytes(b"no image")
    work = tmp_path / "work"
    result = run("-w", str(work))
    assert result.exit_code == 1
    assert "[3/4]" in result.stderr
    assert str(bad) in result.stderr
    assert "3 scans segmented, 0 finished before, 1 failed" in result.stdout
    assert [path.name for path in work.iterdir()] == ["crash-sub-01_ses-2.txt"]
    assert "Traceback" in (work / "crash-sub-01_ses-2.txt").read_text(encoding="utf-8")

    (work / "crash-sub-01_ses-2.txt").unlink()
    (work / "crash-sub-01_ses-2.txt").mkdir()
    result = run("-w", str(work))
    assert "crash-sub-01_ses-2.txt cannot be written" in result.stderr
    (work / "crash-sub-01_ses-2.txt").rmdir()

    bad.write_bytes(good)
    result = run("-w", str(work))
    assert result.exit_code == 0
    assert "1 scans segmented, 3 finished before" in result.stdout
    assert list(work.iterdir()) == []


def test_filter_file_and_participants_without_scans(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "filter.json"
    path.write_text('{"flair": {"run": 2}}', encoding="utf-8")
    result = run("--bids-filter-file", str(path))
    assert result.exit_code == 0, result.output
    assert "1 participants have no such FLAIR: sub-02" in result.stderr
    masks = [name for name in files_below(tmp_path / "out") if name.endswith("_mask.nii.gz")]
    assert len(masks) == 1
    assert "run-2" in masks[0]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--participant-label", "77"), 2, "no participant 77"),
        (("--session-id", "7", "--participant-label", "01"), 2, "session 7"),
        (("--bids-filter-file", "none.json"), 2, "Cannot read none.json"),
        (("--tta", "many"), 2, "many"),
        (("--n-procs", "0"), 2, "n-procs"),
    ],
)
def test_what_cannot_be_meant(
    run: Run, tmp_path: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    result = run(*options)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_work_folder_in_the_data_set_is_refused(run: Run, root: Path) -> None:
    result = run("--work-dir", str(root / "work"))
    assert result.exit_code == 2
    assert "lies in the data set" in result.stderr


def test_a_data_set_without_description(run: Run, root: Path) -> None:
    (root / "dataset_description.json").unlink()
    result = run()
    assert result.exit_code == 1
    assert "BIDS requires it" in result.stderr
    assert run("--skip-bids-validation", "--participant-label", "02").exit_code == 0


def test_a_data_set_without_flair(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "raw", "sub-01_T1w")
    result = invoke(root, tmp_path / "out", "participant")
    assert result.exit_code == 1
    assert "has no FLAIR" in result.stderr


def test_group_tells_of_incomplete_scans(run: Run, root: Path, tmp_path: Path) -> None:
    assert run("--participant-label", "02").exit_code == 0
    scan = find_flairs(root, participants=["02"]).scans[0]
    derived_files(tmp_path / "out", scan.name).report.unlink()
    result = invoke(root, tmp_path / "out", "group")
    assert result.exit_code == 1
    assert "1 scans have incomplete results" in result.stderr


def test_a_lost_process_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        """Hands over no result, as after the system has ended a process."""

        def __init__(self, count: int, *, initargs: tuple[RunOptions], **_: object) -> None:
            options = initargs[0].inference
            assert (count, options.threads, options.max_memory) == (2, 3, str(2**29))

        def submit(self, *_: object) -> Future[object]:
            future: Future[object] = Future()
            future.set_exception(BrokenProcessPool("gone"))
            return future

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr("wmh_lora.cli.bids_run.ProcessPoolExecutor", Pool)
    result = run("--n-procs", "2", "--threads", "6", "--max-memory", "1G")
    assert result.exit_code == 1
    assert result.stderr.count("smaller --n-procs") == 4


@pytest.fixture
def undo_phantom_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmh_lora.engine.load_model", load_model)
    monkeypatch.setattr("wmh_lora.cli.bids_run.describe_model", describe_model)


@pytest.mark.slow
@pytest.mark.usefixtures("undo_phantom_model")
def test_a_model_is_described_as_it_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    init_model(path, "compact", seed=0)
    options = Options(tmp_path / "out", model=str(path), threshold=0.7)
    model, inference = describe_model(RunOptions(options))
    loaded = load_model(path)
    assert model == loaded.describe()
    assert inference.threshold == 0.7
    assert inference.min_voxels == loaded.card.inference.min_voxels
    with pytest.raises(ConfigError, match="no model file"):
        describe_model(RunOptions(Options(tmp_path, model="absent")))


@pytest.mark.slow
@pytest.mark.usefixtures("undo_phantom_model")
def test_processes_give_what_one_process_gives(run: Run, root: Path, tmp_path: Path) -> None:
    model = tmp_path / "small.safetensors"
    init_model(model, "compact", seed=0)
    bad = root / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_FLAIR.nii.gz"
    bad.write_bytes(b"no image")
    options = ("--model", str(model), "--threads", "2", "--threshold", "0.4")
    result = run(*options, "--n-procs", "2")
    assert result.exit_code == 1
    assert "3 scans segmented, 0 finished before, 1 failed" in result.stdout
    alone = invoke(root, tmp_path / "alone", "participant", *options)
    assert alone.exit_code == 1
    assert [line.split("]")[1] for line in result.stdout.splitlines()[:3]] == [
        line.split("]")[1] for line in alone.stdout.splitlines()[:3]
    ]
    for path in sorted((tmp_path / "alone").rglob("*_probseg.nii.gz")):
        other = tmp_path / "out" / path.relative_to(tmp_path / "alone")
        expected = Volume.read(path, allow_constant=True).data
        np.testing.assert_allclose(
            Volume.read(other, allow_constant=True).data, expected, atol=1e-3
        )


@pytest.mark.realdata
@pytest.mark.usefixtures("undo_phantom_model")
@pytest.mark.parametrize(
    ("dataset", "participant"), [("tabriz", "03"), ("ljubljana-longitudinal", "04")]
)
def test_real_data_sets_give_valid_derivatives(
    shared_data: Path, tmp_path: Path, dataset: str, participant: str
) -> None:
    out = tmp_path / "out"
    root = shared_data / dataset
    result = invoke(root, out, "participant", "--participant-label", participant)
    assert result.exit_code == 0, result.output
    assert invoke(root, out, "group").exit_code == 0
    issues = validate(out)
    print(f"\n{dataset}: {result.stdout}{sorted(warnings_of(issues))}")  # noqa: T201 -- quoted
    assert errors_of(issues) == []
    description = json.loads((out / "dataset_description.json").read_text(encoding="utf-8"))
    assert (out / description["DatasetLinks"]["raw"]).resolve() == root.resolve()


class TestT1:
    """Scan 2 has a T1 in which one of its two lesions is bright, and therefore none."""

    @pytest.fixture
    def with_t1(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        model = t1_model()
        monkeypatch.setattr("wmh_lora.engine.load_model", lambda name, **_: model)
        monkeypatch.setattr("wmh_lora.models.model_file.read_model_card", lambda _: model.card)
        flair, second = head(1)
        second[:, 25:] = 0
        path = root / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_T1w.nii.gz"
        t1 = t1_of_head(flair, second)
        write_nifti(path, t1.data, t1)
        return path

    def test_is_shown_where_there_is_one_and_recorded(
        self, with_t1: Path, root: Path, run: Run, tmp_path: Path
    ) -> None:
        first = run("--t1")
        assert first.exit_code == 0, first.output
        assert "3 FLAIR scans have no T1w" in first.stderr
        lesions = [line.rpartition(" in ")[2] for line in first.stdout.splitlines()[:4]]
        assert lesions == ["2 lesions", "2 lesions", "1 lesion", "2 lesions"]
        scan = find_flairs(root, with_t1=True).scans[2]
        sidecar = json.loads(derived_files(tmp_path / "out", scan.name).mask_sidecar.read_text())
        assert sidecar["Sources"][1].endswith(with_t1.name)
        assert sidecar["T1SHA256"] == file_sha256(with_t1)
        assert "4 scans were finished before" in run("--t1").stdout
        without = run()  # other results than those that are there
        assert without.exit_code == 2
        assert "sub-01_ses-2" in without.stderr

    def test_a_model_of_flair_alone_says_so(self, run: Run) -> None:
        result = run("--t1", "--model", "flair-v1")
        assert result.exit_code == 2
        assert "takes FLAIR alone" in result.stderr

    def test_is_not_to_be_registered_where_none_is_used(self, run: Run) -> None:
        result = run("--register-t1")
        assert result.exit_code == 2
        assert "needs --t1" in result.stderr
