"""What is written for a scan and for the data set, and how it is known again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bids_trees import write_dataset
from tests.phantoms import brightness_model, head, t1_model, t1_of_head
from wmh_lora.bids.derivatives import (
    dataset_description,
    results_state,
    save_scan,
    settings_record,
    write_dataset_files,
)
from wmh_lora.bids.discovery import RawScan, find_flairs
from wmh_lora.bids.names import derived_files
from wmh_lora.config import InferenceConfig
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.volume import write_nifti

MODEL = brightness_model()
RECORD = settings_record(MODEL.describe(), MODEL.card.inference)


@pytest.fixture
def scan(tmp_path: Path) -> RawScan:
    root = write_dataset(tmp_path / "raw", "sub-01_ses-1_run-1_FLAIR")
    return find_flairs(root).scans[0]


@pytest.fixture
def out(tmp_path: Path, scan: RawScan) -> Path:
    """The derivatives of the scan."""
    found = WMHInferenceEngine(MODEL, "cpu").segment(scan.source)
    report = save_scan(found, scan, tmp_path / "out", RECORD)
    assert report["lesion_count"] == 2
    return tmp_path / "out"


def test_states(tmp_path: Path, scan: RawScan, out: Path) -> None:
    files = derived_files(out, scan.name)
    assert results_state(tmp_path / "elsewhere", scan, RECORD) == "absent"
    assert results_state(out, scan, RECORD) == "finished"

    changed = settings_record(MODEL.describe(), InferenceConfig(threshold=0.6))
    assert results_state(out, scan, changed) == "different"
    other = settings_record({**MODEL.describe(), "sha256": "2" * 64}, MODEL.card.inference)
    assert results_state(out, scan, other) == "different"
    faster = settings_record(MODEL.describe(), InferenceConfig(batch_size=7, max_memory="1G"))
    assert results_state(out, scan, faster) == "finished"

    files.page.unlink()
    assert results_state(out, scan, RECORD) == "partial"
    files.page.write_text("again", encoding="utf-8")
    text = files.mask_sidecar.read_text(encoding="utf-8")
    files.mask_sidecar.write_text(text[:40], encoding="utf-8")  # cut off
    assert results_state(out, scan, RECORD) == "partial"
    files.mask_sidecar.write_text(text, encoding="utf-8")
    assert results_state(out, scan, RECORD) == "finished"

    with scan.source.open("ab") as stream:  # another version of the scan
        stream.write(b"\0")
    assert results_state(out, scan, RECORD) == "different"


def test_a_sidecar_names_source_and_settings(scan: RawScan, out: Path) -> None:
    files = derived_files(out, scan.name)
    sidecar = json.loads(files.mask_sidecar.read_text(encoding="utf-8"))
    assert sidecar["Sources"] == ["bids:raw:sub-01/ses-1/anat/sub-01_ses-1_run-1_FLAIR.nii.gz"]
    assert sidecar["Type"] == "Lesion"
    assert sidecar["SpatialReference"] == "orig"
    assert sidecar["Threshold"] == MODEL.card.inference.threshold
    assert sidecar["Model"]["SHA256"] == MODEL.sha256
    report = json.loads(files.report.read_text(encoding="utf-8"))
    assert sidecar["SourceSHA256"] == report["file_sha256"]


def test_results_are_not_replaced_unasked(scan: RawScan, out: Path) -> None:
    found = WMHInferenceEngine(MODEL, "cpu").segment(scan.source)
    before = {path: path.stat().st_mtime_ns for path in derived_files(out, scan.name)}
    with pytest.raises(DataError, match="exists already"):
        save_scan(found, scan, out, RECORD)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    save_scan(found, scan, out, RECORD, overwrite=True)
    assert results_state(out, scan, RECORD) == "finished"


def test_description_links_the_source(tmp_path: Path) -> None:
    raw = {"Name": "Study", "License": "CC-BY-4.0", "DatasetDOI": "10.1/x"}
    out = tmp_path / "raw" / "derivatives" / "wmh-lora"
    description = dataset_description(out, tmp_path / "raw", raw)
    assert description["DatasetLinks"] == {"raw": "../.."}
    assert description["DatasetType"] == "derivative"
    assert description["SourceDatasets"] == [{"URL": "bids:raw:", "DOI": "10.1/x"}]
    assert description["License"] == "CC-BY-4.0"
    assert "License" not in dataset_description(out, tmp_path / "raw", {})


def test_dataset_files_are_renewed_but_nobody_elses(tmp_path: Path) -> None:
    out, raw = tmp_path / "out", tmp_path / "raw"
    out.mkdir()
    write_dataset_files(out, raw, {"Name": "A"})
    first = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert set(first) == {"dataset_description.json", "README.md", ".bidsignore"}
    write_dataset_files(out, raw, {"Name": "A"})
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == first
    write_dataset_files(out, raw, {"Name": "B"})
    assert "of B" in (out / "dataset_description.json").read_text(encoding="utf-8")

    description = out / "dataset_description.json"
    for foreign in ('{"GeneratedBy": [{"Name": "fMRIPrep"}]}', '{"Name": "raw"}', "not JSON"):
        description.write_text(foreign, encoding="utf-8")
        with pytest.raises(ConfigError, match="holds another data set"):
            write_dataset_files(out, raw, {})
        assert description.read_text(encoding="utf-8") == foreign


def test_the_data_set_itself_is_no_output_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the data set itself"):
        write_dataset_files(tmp_path / "a" / "..", tmp_path, {})


class TestToBids:
    def test_a_run_of_the_app_knows_its_results_again(self, tmp_path: Path, scan: RawScan) -> None:
        """Also where three planes have another threshold, or the processor chose the precision."""
        model = brightness_model(
            planes="all", threshold=0.6, threshold_three_planes=0.2, precision="auto"
        )
        found = WMHInferenceEngine(model, "cpu").segment(scan.source)
        found.to_bids(tmp_path / "library")
        record = settings_record(model.describe(), model.card.inference)
        assert results_state(tmp_path / "library", scan, record) == "finished"

    def test_writes_what_the_command_writes(self, tmp_path: Path, scan: RawScan, out: Path) -> None:
        found = WMHInferenceEngine(MODEL, "cpu").segment(scan.source)
        mask = found.to_bids(tmp_path / "library")
        assert mask == derived_files(tmp_path / "library", scan.name).mask
        for written in sorted(out.rglob("*mask.*")):
            twin = tmp_path / "library" / written.relative_to(out)
            assert twin.read_bytes() == written.read_bytes(), written.name
        assert results_state(tmp_path / "library", scan, RECORD) == "finished"
        description = json.loads((mask.parents[3] / "dataset_description.json").read_text())
        assert description["DatasetType"] == "derivative"
        with pytest.raises(DataError, match="overwriting"):
            found.to_bids(tmp_path / "library")
        assert found.to_bids(tmp_path / "library", overwrite=True) == mask

    def test_names_the_t1_as_the_command_does(self, tmp_path: Path, scan: RawScan) -> None:
        flair, bright = head()
        t1 = t1_of_head(flair, bright)
        path = scan.source.with_name("sub-01_ses-1_run-1_T1w.nii.gz")
        write_nifti(path, t1.data, t1)
        engine = WMHInferenceEngine(t1_model(), "cpu")
        engine.segment(scan.source, t1=path).to_bids(tmp_path / "library")
        (with_t1,) = find_flairs(scan.root, with_t1=True).scans
        record = settings_record(t1_model().describe(), t1_model().card.inference)
        assert results_state(tmp_path / "library", with_t1, record) == "finished"
        assert results_state(tmp_path / "library", scan, record) == "different"
        moved = settings_record(
            t1_model().describe(), t1_model().card.inference, t1_registered=True
        )
        assert results_state(tmp_path / "library", with_t1, moved) == "different"

        elsewhere = tmp_path / "T1w.nii.gz"
        elsewhere.write_bytes(path.read_bytes())
        with pytest.raises(ConfigError, match="no file of the data set"):
            engine.segment(scan.source, t1=elsewhere).to_bids(tmp_path / "another")
        with pytest.raises(ConfigError, match="in memory"):
            engine.segment(scan.source, t1=t1).to_bids(tmp_path / "another")
        assert not (tmp_path / "another").exists()

    def test_says_why_a_scan_has_no_place(self, tmp_path: Path, scan: RawScan) -> None:
        engine = WMHInferenceEngine(MODEL, "cpu")
        loose = tmp_path / "sub-01_FLAIR.nii.gz"
        loose.write_bytes(scan.source.read_bytes())
        with pytest.raises(ConfigError, match="does not lie in sub-01/anat"):
            engine.segment(loose).to_bids(tmp_path / "library")
        with pytest.raises(ConfigError, match="raw_dir"):
            engine.segment(scan.source).to_bids(tmp_path / "library", raw_dir=tmp_path)
        in_memory = replace(engine.segment(scan.source).volume, path=None)
        with pytest.raises(ConfigError, match="in memory"):
            engine.segment(in_memory).to_bids(tmp_path / "library")
        assert not (tmp_path / "library").exists()


def test_another_adapter_of_the_same_name_is_another_model() -> None:
    described = {**MODEL.describe(), "adapter": "my-site"}
    one, other = (
        settings_record({**described, "adapter_sha256": digit * 64}, MODEL.card.inference)
        for digit in "12"
    )
    assert one != other


def test_what_a_user_adds_to_the_folder_stays(tmp_path: Path, scan: RawScan) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my own notes\n")
    (out / ".bidsignore").write_bytes(b"scratch/\n# M\xfcller\n")
    write_dataset_files(out, scan.root, {})
    path = out / "dataset_description.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "Authors": ["One", "Two"]}))
    write_dataset_files(out, scan.root, {"License": "CC0"})
    assert (out / "README.md").read_text() == "my own notes\n"
    ignored = (out / ".bidsignore").read_bytes().decode("latin-1").splitlines()
    assert ignored[0] == "scratch/"
    assert len(ignored) == len(set(ignored)) > 5
    description = json.loads(path.read_text())
    assert description["Authors"] == ["One", "Two"]
    assert description["License"] == "CC0"


def test_a_readme_of_an_earlier_version_is_renewed(tmp_path: Path, scan: RawScan) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_dataset_files(out, scan.root, {})
    readme = out / "README.md"
    now = readme.read_text()
    readme.write_text(now.replace("WMH-LoRA ", "WMH-LoRA 0.0.1-"))
    write_dataset_files(out, scan.root, {})
    assert readme.read_text() == now


def test_derivatives_of_two_data_sets_are_not_mixed(tmp_path: Path, scan: RawScan) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_dataset_files(out, scan.root, {})
    other = write_dataset(tmp_path / "other", "sub-02_FLAIR")
    with pytest.raises(ConfigError, match="holds derivatives of"):
        write_dataset_files(out, other, {})
    moved = scan.root.rename(tmp_path / "moved")
    write_dataset_files(out, moved, {})
    links = json.loads((out / "dataset_description.json").read_text())["DatasetLinks"]
    assert links == {"raw": "../moved"}


def test_a_scan_without_t1_is_not_said_to_have_one_that_was_registered(
    scan: RawScan, out: Path
) -> None:
    registered = settings_record(MODEL.describe(), MODEL.card.inference, t1_registered=True)
    assert results_state(out, scan, registered) == "finished"


def test_results_stay_finished_where_the_scan_s_content_is_not_at_hand(
    scan: RawScan, out: Path
) -> None:
    scan.source.unlink()
    scan.source.symlink_to("../annex/objects/absent")
    assert results_state(out, scan, RECORD) == "finished"
    changed = settings_record(MODEL.describe(), InferenceConfig(threshold=0.6))
    assert results_state(out, scan, changed) == "different"


def test_places_that_cannot_be_are_told_in_a_sentence(tmp_path: Path, scan: RawScan) -> None:
    found = WMHInferenceEngine(MODEL, "cpu").segment(scan.source)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ConfigError, match="is a file"):
        found.to_bids(blocked)
    derived = scan.source.with_name("sub-01_ses-1_run-1_space-T1w_FLAIR.nii.gz")
    scan.source.rename(derived)
    again = WMHInferenceEngine(MODEL, "cpu").segment(derived)
    with pytest.raises(ConfigError, match="by space- in its name"):
        again.to_bids(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_any_network_s_results_can_be_written(tmp_path: Path, scan: RawScan) -> None:
    found = WMHInferenceEngine(MODEL.net, "cpu").segment(scan.source)
    mask = found.to_bids(tmp_path / "bids")
    sidecar = json.loads(mask.with_name(mask.name.replace(".nii.gz", ".json")).read_text())
    assert sidecar["Model"] == {"Name": type(MODEL.net).__name__}
