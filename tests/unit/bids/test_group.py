"""The table over all scans, from reports alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.phantoms import brightness_model, head
from wmh_lora.bids.group import collect_group, write_group
from wmh_lora.bids.names import derived_files, parse_name
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.errors import DataError
from wmh_lora.report.tables import COHORT_COLUMNS

SCANS = ("sub-01_ses-1", "sub-01_ses-2_run-1", "sub-01_ses-2_run-2", "sub-02")
REPORT = WMHInferenceEngine(brightness_model(), "cpu").segment(head()[0]).report()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Derivatives, of which the table reads the reports alone."""
    for stem in SCANS:
        for path in derived_files(tmp_path, parse_name(f"{stem}_FLAIR.nii.gz")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            if path.name.endswith("_wmh.json"):
                path.write_text(json.dumps(REPORT), encoding="utf-8")
    return tmp_path


def test_one_row_a_scan_and_every_column_described(out: Path) -> None:
    table = collect_group(out)
    path = write_group(table, out)
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    assert [row["scan"] for row in rows] == list(SCANS)
    assert [row["participant_id"] for row in rows] == ["sub-01"] * 3 + ["sub-02"]
    assert [row["session_id"] for row in rows] == ["ses-1", "ses-2", "ses-2", "n/a"]
    assert [row["run"] for row in rows] == ["n/a", "1", "2", "n/a"]
    assert {row["wmh_volume_ml"] for row in rows} == {f"{REPORT['wmh_volume_ml']:.4f}"}
    dictionary = json.loads((out / "wmh.json").read_text(encoding="utf-8"))
    assert list(dictionary) == list(rows[0])
    assert list(rows[0])[3:] == list(COHORT_COLUMNS)
    assert all(entry["Description"] for entry in dictionary.values())
    page = (out / "wmh.html").read_text(encoding="utf-8")
    assert f'href="sub-01/ses-1/anat/{SCANS[0]}_wmh.html"' in page


def test_chosen_labels(out: Path) -> None:
    rows = collect_group(out, participants=["sub-01"], sessions=["2"]).rows
    assert [row["scan"] for row in rows] == list(SCANS[1:3])


def test_an_incomplete_scan_has_a_row_without_numbers(out: Path) -> None:
    first = derived_files(out, parse_name(f"{SCANS[0]}_FLAIR.nii.gz"))
    first.report.unlink()
    second = derived_files(out, parse_name(f"{SCANS[1]}_FLAIR.nii.gz"))
    second.report.write_text("{}", encoding="utf-8")
    table = collect_group(out)
    assert [failure.name for failure in table.failures] == list(SCANS[:2])
    assert [row["status"] for row in table.rows] == ["failed", "failed", "done", "done"]
    assert table.rows[0]["wmh_volume_ml"] == "n/a"
    assert "is missing" in table.rows[0]["message"]
    assert "no readable report" in table.rows[1]["message"]


def test_nothing_to_tabulate(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no results"):
        collect_group(tmp_path)


def test_a_table_is_not_replaced_unasked(out: Path) -> None:
    table = collect_group(out)
    write_group(table, out)
    with pytest.raises(DataError, match="exists already"):
        write_group(table, out)
    (out / "wmh.tsv").unlink()
    with pytest.raises(DataError, match="exists already"):  # the page and the dictionary do
        write_group(table, out)
    write_group(table, out, overwrite=True)
    assert (out / "wmh.tsv").is_file()


def test_tasks_have_a_column_where_scans_have_them(out: Path) -> None:
    stem = "sub-02_task-rest"
    for path in derived_files(out, parse_name(f"{stem}_FLAIR.nii.gz")):
        path.write_text(json.dumps(REPORT), encoding="utf-8")
    rows = {row["scan"]: row for row in collect_group(out).rows}
    assert rows[stem]["task"] == "rest"
    assert rows["sub-02"]["task"] == "n/a"
