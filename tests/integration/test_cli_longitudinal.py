"""`wmh-lora longitudinal` from files to files."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.followed_heads import FIRST, SECOND, coarse_visit
from tests.phantoms import brightness_model, write_head
from wmh_lora.cli.longitudinal import longitudinal
from wmh_lora.errors import ConfigError, DataError, GridMismatchError, UnreadableImageError
from wmh_lora.volume import Volume, write_nifti


def run(*words: object) -> Result:
    return CliRunner().invoke(longitudinal, [str(word) for word in words])


def save_visits(folder: Path) -> tuple[list[Path], list[Path]]:
    scans, masks = [], []
    for session, lesions in (("1", FIRST), ("2", SECOND)):
        one = coarse_visit(session, lesions)
        start = folder / f"sub-7_ses-{session}"
        scans.append(start.with_name(start.name + "_FLAIR.nii.gz"))
        masks.append(start.with_name(start.name + "_mask.nii.gz"))
        write_nifti(scans[-1], one.volume.data, one.volume)
        write_nifti(masks[-1], one.mask, one.volume)
    return scans, masks


def test_masks_give_every_file(tmp_path: Path) -> None:
    scans, masks = save_visits(tmp_path)
    out = tmp_path / "out"
    words = (*scans, "--masks", *masks, "-o", out, "--no-register")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "ses-1 to ses-2" in result.output
    names = {
        "sub-7_longitudinal.json",
        "sub-7_longitudinal.png",
        "sub-7_changes.tsv",
        "sub-7_changes.json",
        "sub-7_space-halfway_desc-lesions_dseg.nii.gz",
        "sub-7_space-halfway_desc-change_dseg.nii.gz",
        "sub-7_ses-1_space-halfway_FLAIR.nii.gz",
        "sub-7_ses-2_space-halfway_FLAIR.nii.gz",
        "sub-7_ses-1_from-halfway_to-orig_xfm.txt",
        "sub-7_ses-2_from-halfway_to-orig_xfm.txt",
    }
    assert {path.name for path in out.iterdir()} == names
    report = json.loads((out / "sub-7_longitudinal.json").read_text())
    assert report["changes"][0]["lesions"]["new"] == 1
    assert report["changes"][0]["lesions"]["vanished"] == 1
    assert str(tmp_path) not in json.dumps(report)
    rows = list(
        csv.DictReader((out / "sub-7_changes.tsv").read_text().splitlines(), delimiter="\t")
    )
    assert list(rows[0]) == list(json.loads((out / "sub-7_changes.json").read_text()))
    lesions, change = (
        Volume.read(out / f"sub-7_space-halfway_desc-{name}_dseg.nii.gz").data
        for name in ("lesions", "change")
    )
    assert sorted({int(row["lesion"]) for row in rows}) == np.unique(lesions)[1:].tolist()
    for row in rows:
        inside = lesions == int(row["lesion"])
        assert set(change[inside]) == {report["change_labels"][row["change"]]}
    matrix = np.loadtxt(out / "sub-7_ses-1_from-halfway_to-orig_xfm.txt")
    np.testing.assert_array_equal(matrix, np.eye(4))
    with Image.open(out / "sub-7_longitudinal.png") as picture:
        assert picture.mode == "RGB"
    again = run(*words)
    assert isinstance(again.exception, ConfigError)
    before = (out / "sub-7_longitudinal.json").read_bytes()
    assert run(*words, "--overwrite").exit_code == 0
    assert (out / "sub-7_longitudinal.json").read_bytes() == before


def test_scans_are_segmented_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans = [write_head(tmp_path / f"ses-{n}" / "FLAIR.nii.gz", seed=n) for n in (1, 2)]
    model = brightness_model(threshold=0.5)
    monkeypatch.setattr("wmh_lora.engine.load_model", lambda *args, **kwargs: model)
    result = run(*scans, "-o", tmp_path / "out", "--no-register", "--device", "cpu")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "FLAIR_longitudinal.json").read_text())
    assert [one["name"] for one in report["visits"]] == ["ses-1", "ses-2"]
    assert report["visits"][0]["model"]["name"] == "brightness"
    assert report["changes"][0]["within_repeatability"]
    assert report["changes"][0]["lesions"]["stable"] == 2
    native = Volume.read(tmp_path / "out" / "FLAIR_ses-2_space-orig_label-WMH_mask.nii.gz")
    np.testing.assert_array_equal(native.affine, Volume.read(scans[1]).affine)


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    scans, masks = save_visits(tmp_path)
    out = tmp_path / "out"
    for words, kind in (
        ((scans[0],), ConfigError),
        ((*scans, "--masks", masks[0]), ConfigError),
        ((scans[0], tmp_path / "none.nii.gz", "--masks", *masks), UnreadableImageError),
        ((*scans, "--masks", masks[0], write_head(tmp_path / "h.nii.gz")), GridMismatchError),
    ):
        result = run(*words, "-o", out)
        assert isinstance(result.exception, kind), result.output
    assert run(*scans, "-o", out, "--masks").exit_code == 2
    chosen = run(*scans, "-o", out, "--masks", *masks, "--threads", 1, "--threshold", 0.4)
    assert chosen.exit_code == 2
    assert "--threshold is for segmenting" in chosen.output
    assert not out.exists()


def test_masks_of_anything_else_are_refused_and_other_pathology_is_left_out(
    tmp_path: Path,
) -> None:
    scans, masks = save_visits(tmp_path)
    first = Volume.read(masks[0])
    words = (*scans, "--masks", *masks, "-o", tmp_path / "out", "--no-register")
    write_nifti(masks[0], first.data * 77, first, overwrite=True)
    refused = run(*words)
    assert isinstance(refused.exception, DataError)
    assert "values 77" in str(refused.exception)
    labels = first.data.copy()
    labels[:2, :2, :2] = 2
    write_nifti(masks[0], labels, first, overwrite=True)
    assert run(*words).exit_code == 0
    report = json.loads((tmp_path / "out" / "sub-7_longitudinal.json").read_text())
    expected = first.data.sum() * first.voxel_volume_ml
    assert report["visits"][0]["wmh_volume_ml"] == pytest.approx(expected, rel=1e-4)


def test_other_people_and_equal_scans_are_warned_of(tmp_path: Path) -> None:
    scans, masks = save_visits(tmp_path)
    copied = tmp_path / "sub-8_ses-2_FLAIR.nii.gz"
    copied.write_bytes(scans[0].read_bytes())
    words = (scans[0], copied, "--masks", masks[0], masks[0], "-o", tmp_path / "out")
    result = run(*words, "--no-register")
    assert result.exit_code == 0, result.output
    (report,) = (tmp_path / "out").glob("*_longitudinal.json")
    warnings = json.loads(report.read_text())["warnings"]
    assert "the scans are of 2 subjects by their names" in warnings
    assert "ses-1 and ses-2 show the same scan." in warnings


def test_without_simpleitk_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, masks = save_visits(tmp_path)
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    result = run(*scans, "--masks", *masks, "-o", tmp_path / "out")
    assert isinstance(result.exception, ConfigError)
    assert "pip install 'wmh-lora[registration]'" in str(result.exception)


@pytest.mark.realdata
def test_two_real_visits(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "ljubljana-longitudinal" / "sub-12"
    scans = [folder / f"ses-{n}" / "anat" / f"sub-12_ses-{n}_FLAIR.nii.gz" for n in (1, 2)]
    result = run(*scans, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "sub-12_longitudinal.json").read_text())
    assert report["visits"][1]["registration_inconsistency_mm"] < 1.0
    assert sum(report["changes"][0]["lesions"].values()) > 0
    by_kind = sum(report["changes"][0]["change_by_kind_ml"].values())
    volumes = [one["wmh_volume_ml"] for one in report["visits"]]
    assert by_kind == pytest.approx(volumes[1] - volumes[0], abs=1e-3)
