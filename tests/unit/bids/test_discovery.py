"""Which scans a data set holds, and which of them are asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wmh_lora.bids.discovery import (
    FoundScans,
    find_flairs,
    read_dataset_description,
    read_filters,
)
from wmh_lora.errors import ConfigError, DataError

FILES = (
    "sub-01/anat/sub-01_FLAIR.nii.gz",
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_acq-3d_run-01_FLAIR.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_acq-3d_run-02_FLAIR.nii.gz",
    "sub-02/ses-2/anat/sub-02_ses-2_acq-2d_FLAIR.nii",
    "sub-02/ses-2/anat/sub-02_ses-2_part-phase_FLAIR.nii.gz",
    "sub-02/ses-2/anat/._sub-02_ses-2_acq-2d_FLAIR.nii",
    "sub-03/ses-1/anat/sub-03_ses-1_T1w.nii.gz",
    "derivatives/other/sub-01/anat/sub-01_FLAIR.nii.gz",
    "sourcedata/sub-04/anat/sub-04_FLAIR.nii.gz",
)
ALL = ["sub-01", "sub-02_ses-1_acq-3d_run-01", "sub-02_ses-1_acq-3d_run-02", "sub-02_ses-2_acq-2d"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Discovery opens no scan, so empty files do."""
    return tree(tmp_path / "raw", *FILES)


def tree(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def stems(found: FoundScans) -> list[str]:
    return [scan.name.stem for scan in found.scans]


def test_all_sessions_and_runs_and_nothing_else(root: Path) -> None:
    found = find_flairs(root)
    assert stems(found) == ALL
    assert found.without == ("sub-03",)
    assert found.scans[1].uris == [f"bids:raw:{FILES[2]}"]
    assert all(scan.source.is_file() for scan in found.scans)


def test_a_t1_is_that_of_the_session_with_the_nearest_name(root: Path) -> None:
    session = "sub-02/ses-1/anat/sub-02_ses-1"
    tree(
        root,
        f"{session}_acq-2d_T1w.nii.gz",
        f"{session}_acq-3d_run-02_T1w.nii.gz",
        f"{session}_T1w.nii.gz",
        f"{session}_acq-3d_run-01_space-MNI_T1w.nii.gz",  # derived
        f"{session}_acq-3d_run-01_part-phase_T1w.nii.gz",
        "sub-02/ses-1/anat/._sub-02_ses-1_acq-3d_run-01_T1w.nii.gz",
    )
    found = find_flairs(root, with_t1=True)
    assert stems(found) == ALL
    assert [scan.t1 and scan.t1.relative_to(root).as_posix() for scan in found.scans] == [
        FILES[1],
        f"{session}_acq-3d_run-02_T1w.nii.gz",  # acquisition is shared
        f"{session}_acq-3d_run-02_T1w.nii.gz",
        None,
    ]
    assert found.scans[0].uris == [f"bids:raw:{file}" for file in FILES[:2]]
    assert all(scan.t1 is None for scan in find_flairs(root).scans)


@pytest.mark.parametrize(
    ("people", "sessions", "expected"),
    [
        (["01"], [], ALL[:1]),
        (["sub-02", "01", "01"], [], ALL),
        ([], ["2"], ALL[3:]),
        (["02"], ["ses-1"], ALL[1:3]),
    ],
)
def test_chosen_labels(
    root: Path, people: list[str], sessions: list[str], expected: list[str]
) -> None:
    assert stems(find_flairs(root, participants=people, sessions=sessions)) == expected


def test_unknown_labels_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="no participant 9; there are 3: 01, 02, 03"):
        find_flairs(root, participants=["01", "9"])
    with pytest.raises(ConfigError, match="session 7; there are 1, 2"):
        find_flairs(root, sessions=["7"])


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"acquisition": "3d"}, ALL[1:3]),
        ({"acq": ["2d", None]}, [ALL[0], ALL[3]]),
        ({"run": 2}, ALL[2:3]),
        ({"run": "2"}, []),  # text is taken as it is written
        ({"session": None}, ALL[:1]),
        ({"session": "*", "run": None}, ALL[3:]),
        ({"datatype": "anat", "suffix": "FLAIR", "subject": "02", "run": [1, 2]}, ALL[1:3]),
        ({}, ALL),
    ],
)
def test_filters(root: Path, tmp_path: Path, filters: dict[str, Any], expected: list[str]) -> None:
    path = tmp_path / "filter.json"
    path.write_text(json.dumps({"t1w": {"anything": 1}, "flair": filters}), encoding="utf-8")
    assert stems(find_flairs(root, filters=read_filters(path))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"FLAIR": {}}', "no entry \"flair\".*found 'FLAIR'"),
        ('{"flair": ["3d"]}', 'no entry "flair" with a table'),
        ('{"flair": {"colour": "red"}}', "filters by colour; known are acq, acquisition"),
        ('{"flair": {"suffix": "T1w"}}', "a FLAIR has FLAIR"),
        ("[]", "holds no JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_filter_file_that_cannot_be_meant(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "filter.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_filters(path)


def test_an_absent_filter_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot read"):
        read_filters(tmp_path / "no.json")


def test_results_that_would_collide_are_refused(tmp_path: Path) -> None:
    twins = ("sub-01/anat/sub-01_FLAIR.nii", "sub-01/anat/sub-01_FLAIR.nii.gz")
    with pytest.raises(ConfigError, match="the same results"):
        find_flairs(tree(tmp_path / "raw", *twins))


def test_a_scan_in_the_wrong_folder_is_refused(tmp_path: Path) -> None:
    root = tree(tmp_path / "raw", "sub-01/anat/sub-02_FLAIR.nii.gz")
    with pytest.raises(ConfigError, match="expected sub-02/anat"):
        find_flairs(root)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no folder sub-"):
        find_flairs(tmp_path)
    with pytest.raises(DataError, match="Cannot list"):
        find_flairs(tmp_path / "absent")


def test_a_link_to_data_that_were_not_fetched_is_a_scan(root: Path) -> None:
    """As git-annex leaves them: the scan fails in its turn instead of being overlooked."""
    path = root / "sub-03" / "ses-1" / "anat" / "sub-03_ses-1_FLAIR.nii.gz"
    path.symlink_to(root / "nowhere")
    found = find_flairs(root)
    assert stems(found)[-1] == "sub-03_ses-1"
    assert found.without == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "BIDS requires it"),
        ('{"Name": "x"}', "lacks BIDSVersion"),
        ("{}", "lacks Name and BIDSVersion"),
        ("no", "not valid JSON"),
    ],
)
def test_description_is_checked(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "dataset_description.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_dataset_description(tmp_path)


def test_resampled_and_labelled_images_are_left_out_with_a_word(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree(root, "sub-01/anat/sub-01_space-T1w_FLAIR.nii.gz")
    assert stems(find_flairs(root)) == ALL
    assert "by space- in its name" in caplog.text
