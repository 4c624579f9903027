"""`wmh-lora segment` end to end on phantoms: files, tables, exit codes, and bad input."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.phantoms import BrightnessNet, brightness_model, head, write_head
from wmh_lora.cli.main import cli
from wmh_lora.engine import Segmentation, WMHInferenceEngine
from wmh_lora.errors import DeviceError, WeightsError
from wmh_lora.quality_measures import ScanMeasures, measure_scan
from wmh_lora.volume import Volume

ENDINGS = (
    "_space-orig_label-WMH_mask.nii.gz",
    "_space-orig_label-WMH_probseg.nii.gz",
    "_wmh.json",
    "_wmh.png",
    "_wmh.html",
)

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _phantom_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wmh_lora.engine.load_model", lambda name, **_: brightness_model())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `wmh-lora segment` on paths below tmp_path, into tmp_path/out."""

    def invoke(*inputs: str | Path, options: tuple[str, ...] = (), out: str = "out") -> Result:
        paths = [str(tmp_path / path) for path in inputs]
        arguments = ["segment", *paths, "-o", str(tmp_path / out), "--device", "cpu", *options]
        result = CliRunner().invoke(cli, arguments)
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


def names(folder: Path) -> set[str]:
    """Every file below a folder, hidden ones as well."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def outputs_of(*stems: str) -> set[str]:
    return {stem + ending for stem in stems for ending in ENDINGS}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


class TestOneScan:
    @pytest.mark.parametrize(("options", "kept"), [((), 1), (("--max-memory", "4G"), 0)])
    def test_keeps_freed_memory_unless_that_is_limited(
        self,
        tmp_path: Path,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        options: tuple[str, ...],
        kept: int,
    ) -> None:
        calls: list[None] = []
        monkeypatch.setattr("wmh_lora.cli.options.keep_freed_memory", lambda: calls.append(None))
        write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        assert run("sub-01_FLAIR.nii.gz", options=options).exit_code == 0
        assert len(calls) == kept

    def test_measures_the_scan_once_and_ahead(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scan = tmp_path / "sub-01_FLAIR.nii.gz"
        write_head(scan)
        expected = WMHInferenceEngine(brightness_model(), "cpu").segment(scan).quality.as_dict()

        def measured_again(volume: Volume) -> None:
            raise AssertionError("the scan is measured beside the network")

        monkeypatch.setattr("wmh_lora.quality.measure_scan", measured_again)
        result = run("sub-01_FLAIR.nii.gz")
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "out" / "sub-01_wmh.json").read_text(encoding="utf-8"))
        assert report["quality"] == json.loads(json.dumps(expected))

    @pytest.mark.parametrize("options", [(), ("--max-memory", "4G")])
    def test_trouble_with_measuring_one_scan_does_not_stop_the_next(
        self,
        tmp_path: Path,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        options: tuple[str, ...],
    ) -> None:
        def measure(volume: Volume) -> ScanMeasures:
            if volume.path is not None and volume.path.name == "sub-01_FLAIR.nii.gz":
                raise RuntimeError("measuring went wrong")
            return measure_scan(volume)

        monkeypatch.setattr("wmh_lora.quality_measures.measure_scan", measure)
        for name in ("sub-01_FLAIR.nii.gz", "sub-02_FLAIR.nii.gz"):
            write_head(tmp_path / name)
        result = run("sub-01_FLAIR.nii.gz", "sub-02_FLAIR.nii.gz", options=options)
        assert result.exit_code == 1
        assert "measuring went wrong" in result.output
        assert outputs_of("sub-02") <= names(tmp_path / "out")
        assert not outputs_of("sub-01") & names(tmp_path / "out")

    @pytest.mark.parametrize(("page", "ending"), [("none", None), ("pdf", "_wmh.pdf")])
    def test_writes_the_report_that_is_asked_for(
        self, tmp_path: Path, run: Run, page: str, ending: str | None
    ) -> None:
        write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        result = run("sub-01_FLAIR.nii.gz", options=("--report", page))
        assert result.exit_code == 0, result.output
        expected = outputs_of("sub-01") - {"sub-01_wmh.html"}
        assert names(tmp_path / "out") == expected | ({f"sub-01{ending}"} if ending else set())

    def test_a_pdf_without_matplotlib_is_refused_before_any_work(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("wmh_lora.report.extras.find_spec", lambda name: None)
        write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        result = run("sub-01_FLAIR.nii.gz", options=("--report", "pdf"))
        assert result.exit_code == 2
        assert "needs matplotlib" in result.stderr
        assert not (tmp_path / "out").exists()

    def test_writes_the_five_files(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        result = run("sub-01_FLAIR.nii.gz")
        assert result.exit_code == 0, result.output
        assert names(tmp_path / "out") == outputs_of("sub-01")
        assert "sub-01: 4.48 mL in 2 lesions" in result.stdout

    def test_tells_what_the_quality_checks_find(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        result = run("sub-01_FLAIR.nii.gz")
        assert "wmh-lora: sub-01: quality fail: Pixels measure 4.0 mm" in result.stderr
        report = json.loads((tmp_path / "out" / "sub-01_wmh.json").read_text(encoding="utf-8"))
        checks = report["quality"]["checks"]
        found = [check["sentence"] for check in checks if check["verdict"] != "pass"]
        assert len(result.stderr.splitlines()) == len(found)
        assert all(sentence in result.stderr for sentence in found)

    def test_strict_counts_a_failed_quality_check(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        result = run("sub-01_FLAIR.nii.gz", options=("--strict",))
        assert result.exit_code == 1
        assert "failed a quality check; its results are kept" in result.stderr
        assert names(tmp_path / "out") == outputs_of("sub-01")

    def test_mask_lies_on_the_scan_bit_for_bit(self, tmp_path: Path, run: Run) -> None:
        source = write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        run(source.name)
        mask = nib.nifti1.Nifti1Image.from_filename(
            tmp_path / "out" / "sub-01_space-orig_label-WMH_mask.nii.gz"
        )
        scan = nib.nifti1.Nifti1Image.from_filename(source)
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(mask.dataobj), head()[1])
        for field in ("dim", "pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z"):
            np.testing.assert_array_equal(mask.header[field], scan.header[field])

    def test_report(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "sub-01_FLAIR.nii.gz")
        run("sub-01_FLAIR.nii.gz", options=("--tta", "flip", "--threshold", "0.4"))
        text = (tmp_path / "out" / "sub-01_wmh.json").read_text(encoding="utf-8")
        report = json.loads(text)
        assert report["file"] == "sub-01_FLAIR.nii.gz"
        assert report["wmh_volume_ml"] == pytest.approx(4.48)
        assert [lesion["voxels"] for lesion in report["lesions"]] == [24, 4]
        assert report["settings"]["tta"] == "flip"
        assert report["settings"]["threshold"] == 0.4
        assert report["model"]["name"] == "brightness"
        assert str(tmp_path) not in text

    def test_other_formats(self, tmp_path: Path, run: Run) -> None:
        volume, reference = head()
        nib.freesurfer.mghformat.MGHImage(volume.data, volume.affine).to_filename(
            tmp_path / "a.mgz"
        )
        directions = volume.affine[:3, :3] * [[-1.0], [-1.0], [1.0]]  # RAS to LPS
        origin = volume.affine[:3, 3] * [-1.0, -1.0, 1.0]
        nrrd.write(
            str(tmp_path / "b.nrrd"),
            volume.data,
            {
                "space": "left-posterior-superior",
                "space directions": directions.T,
                "space origin": origin,
            },
        )
        assert run("a.mgz", "b.nrrd").exit_code == 0
        for stem in "ab":
            name = f"{stem}_space-orig_label-WMH_mask.nii.gz"
            mask = Volume.read(tmp_path / "out" / name)
            np.testing.assert_array_equal(mask.data, reference)
            np.testing.assert_allclose(mask.affine, volume.affine)

    def test_picture_can_be_opened(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a.nii.gz")
        run("a.nii.gz")
        with Image.open(tmp_path / "out" / "a_wmh.png") as picture:
            picture.load()
            assert min(picture.size) > 200

    def test_min_voxels(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a.nii.gz")
        result = run("a.nii.gz", options=("--min-voxels", "5"))
        assert "in 1 lesion ->" in result.stdout

    def test_model_and_base_weights_are_handed_on(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[object] = []

        def load(name: str, *, base_weights: Path | None, adapter: Path | None) -> object:
            asked.append((name, base_weights, adapter))
            return brightness_model()

        monkeypatch.setattr("wmh_lora.engine.load_model", load)
        write_head(tmp_path / "a.nii.gz")
        options = ("--model", "flair-v1", "--weights", "base.pth")
        assert run("a.nii.gz", options=options).exit_code == 0
        assert run("a.nii.gz", out="other").exit_code == 0
        assert asked == [("flair-v1", Path("base.pth"), None), ("default", None, None)]

    def test_json_is_all_that_stdout_holds(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a_FLAIR.nii.gz")
        result = run("a_FLAIR.nii.gz", "absent.nii.gz", options=("--json",))
        document = json.loads(result.stdout)
        assert result.exit_code == 1
        (scan,) = document["scans"]
        assert scan["scan"] == "a"
        assert scan["lesion_count"] == 2
        assert Path(scan["outputs"]["mask"]).is_file()
        (failed,) = document["failed"]
        assert "absent.nii.gz does not exist" in failed["message"]
        assert Path(document["table"]).is_file()


class TestBatch:
    def test_folder_gets_a_table(self, tmp_path: Path, run: Run) -> None:
        for name in ("sub-02", "sub-01"):
            write_head(tmp_path / "study" / name / "anat" / f"{name}_FLAIR.nii.gz")
        write_head(tmp_path / "study" / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
        result = run("study")
        assert result.exit_code == 0, result.output
        assert names(tmp_path / "out") == outputs_of("sub-01", "sub-02") | {"wmh.tsv", "wmh.html"}
        rows = table(tmp_path / "out" / "wmh.tsv")
        assert [row["scan"] for row in rows] == ["sub-01", "sub-02"]
        assert [row["wmh_volume_ml"] for row in rows] == ["4.4800", "4.4800"]

    def test_a_bad_file_does_not_stop_the_others(self, tmp_path: Path, run: Run) -> None:
        for name in ("a", "c"):
            write_head(tmp_path / "study" / f"{name}.nii.gz")
        (tmp_path / "study" / "b.nii.gz").write_text("not an image")
        result = run("study")
        assert result.exit_code == 1
        assert names(tmp_path / "out") == outputs_of("a", "c") | {"wmh.tsv", "wmh.html"}
        rows = table(tmp_path / "out" / "wmh.tsv")
        assert [row["status"] for row in rows] == ["done", "failed", "done"]
        assert rows[1]["wmh_volume_ml"] == "n/a"
        assert "b.nii.gz" in rows[1]["message"]
        assert "1 of 3 inputs failed" in result.stderr
        assert "b.nii.gz" in result.stderr
        assert "b.nii.gz" not in result.stdout

    def test_an_input_without_scans_hides_no_scan_of_its_name(
        self, tmp_path: Path, run: Run
    ) -> None:
        write_head(tmp_path / "a.nii.gz")
        (tmp_path / "a").mkdir()
        result = run("a.nii.gz", "a")
        assert result.exit_code == 1
        rows = table(tmp_path / "out" / "wmh.tsv")
        assert [(row["scan"], row["status"]) for row in rows] == [("a", "done"), ("a", "failed")]
        assert rows[0]["wmh_volume_ml"] == "4.4800"

    def test_results_are_done_though_nobody_listens(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(text: str, **options: Any) -> None:
            if " mL in " in text:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr("wmh_lora.cli.batch.click.echo", refuse)
        for name in ("a", "b"):
            write_head(tmp_path / f"{name}.nii.gz")
        run("a.nii.gz", "b.nii.gz")
        rows = table(tmp_path / "out" / "wmh.tsv")
        assert [row["status"] for row in rows] == ["done", "done"]

    def test_an_interrupted_run_has_a_table_of_what_is_done(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        segment, calls = WMHInferenceEngine.segment, []

        def interrupted(*given: Any, **settings: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return segment(*given, **settings)

        monkeypatch.setattr(WMHInferenceEngine, "segment", interrupted)
        for name in ("a", "b"):
            write_head(tmp_path / f"{name}.nii.gz")
        assert run("a.nii.gz", "b.nii.gz").exit_code != 0
        rows = table(tmp_path / "out" / "wmh.tsv")
        assert [(row["scan"], row["status"]) for row in rows] == [("a", "done")]

    def test_links_to_one_file_are_scans_of_their_own(self, tmp_path: Path, run: Run) -> None:
        store = write_head(tmp_path / "store.nii.gz")
        (tmp_path / "study").mkdir()
        for name in ("a", "b"):
            (tmp_path / "study" / f"{name}_FLAIR.nii.gz").symlink_to(store)
        assert run("study").exit_code == 0
        assert [row["scan"] for row in table(tmp_path / "out" / "wmh.tsv")] == ["a", "b"]

    @pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
    def test_names_that_are_no_text_are_escaped(self, tmp_path: Path, run: Run) -> None:
        scan = write_head(tmp_path / "a.nii.gz")
        scan.rename(tmp_path / os.fsdecode(b"M\xfcller.nii.gz"))
        write_head(tmp_path / "b.nii.gz")
        assert run(".").exit_code == 0
        rows = table(tmp_path / "out" / "wmh.tsv")
        assert [row["scan"] for row in rows] == ["M\\udcfcller", "b"]

    def test_an_unforeseen_error_does_not_stop_the_others(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        original = BrightnessNet.forward

        def sometimes(self: BrightnessNet, slices: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("something\nodd")
            return original(self, slices)

        monkeypatch.setattr(BrightnessNet, "forward", sometimes)
        for name in ("a", "b"):
            write_head(tmp_path / f"{name}.nii.gz")
        result = run("a.nii.gz", "b.nii.gz")
        assert result.exit_code == 1
        assert names(tmp_path / "out") == outputs_of("b") | {"wmh.tsv", "wmh.html"}
        first, *_ = result.stderr.splitlines()
        assert "a.nii.gz" in first
        assert "something odd" in first

    def test_several_files_get_a_table_and_duplicates_are_done_once(
        self, tmp_path: Path, run: Run
    ) -> None:
        write_head(tmp_path / "a.nii.gz")
        result = run("a.nii.gz", "a.nii.gz", ".")
        assert result.exit_code == 0, result.output
        assert len(table(tmp_path / "out" / "wmh.tsv")) == 1

    def test_equal_names_in_a_folder_keep_their_subfolders(self, tmp_path: Path, run: Run) -> None:
        for number in ("0", "1"):
            write_head(tmp_path / "study" / number / "FLAIR.nii.gz")
        result = run("study")
        assert result.exit_code == 0, result.output
        expected = {f"{number}/{name}" for number in "01" for name in outputs_of("FLAIR")}
        assert names(tmp_path / "out") == expected | {"wmh.tsv", "wmh.html"}
        rows = table(tmp_path / "out" / "wmh.tsv")
        assert [row["scan"] for row in rows] == ["0/FLAIR", "1/FLAIR"]

    def test_inputs_with_one_name_are_refused_before_any_work(
        self, tmp_path: Path, run: Run
    ) -> None:
        write_head(tmp_path / "x" / "a_FLAIR.nii.gz")
        write_head(tmp_path / "y" / "A.nii.gz")
        result = run("x/a_FLAIR.nii.gz", "y/A.nii.gz")
        assert result.exit_code == 2
        assert "would both be written as" in result.stderr
        assert not (tmp_path / "out").exists()


class TestT1:
    def test_belongs_to_one_scan(self, tmp_path: Path, run: Run) -> None:
        for name in ("a", "b"):
            write_head(tmp_path / f"{name}_FLAIR.nii.gz")
        t1 = str(tmp_path / "a_FLAIR.nii.gz")
        result = run("a_FLAIR.nii.gz", "b_FLAIR.nii.gz", options=("--t1", t1))
        assert result.exit_code == 2
        assert "one at a time" in result.stderr

    def test_is_not_to_be_registered_where_there_is_none(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a_FLAIR.nii.gz")
        result = run("a_FLAIR.nii.gz", options=("--register-t1",))
        assert result.exit_code == 2
        assert "--t1 FILE" in result.stderr

    def test_a_model_of_flair_alone_says_so(self, tmp_path: Path, run: Run) -> None:
        scan = write_head(tmp_path / "a_FLAIR.nii.gz")
        result = run(scan.name, options=("--t1", str(scan)))
        assert result.exit_code == 2
        assert "takes FLAIR alone" in result.stderr


class TestExistingResults:
    def test_are_refused_before_any_work(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_head(tmp_path / "a.nii.gz")
        write_head(tmp_path / "b.nii.gz")
        assert run("b.nii.gz").exit_code == 0
        before = names(tmp_path / "out")
        monkeypatch.setattr("wmh_lora.engine.load_model", lambda name, **_: pytest.fail("worked"))
        result = run("a.nii.gz", "b.nii.gz")
        assert result.exit_code == 2
        assert "--overwrite" in result.stderr
        assert "(and 4 more)" in result.stderr
        assert names(tmp_path / "out") == before

    def test_are_replaced_on_request(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a.nii.gz")
        run("a.nii.gz")
        result = run("a.nii.gz", options=("--overwrite", "--min-voxels", "5"))
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "out" / "a_wmh.json").read_text(encoding="utf-8"))
        assert report["lesion_count"] == 1


def _absent(path: Path) -> None:
    """Leave nothing there."""


def _folder_without_images(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("nothing here")


def _truncated(path: Path) -> None:
    write_head(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _text(path: Path) -> None:
    path.write_text("this is no image")


def _packed_text(path: Path) -> None:
    path.write_bytes(gzip.compress(b"this is no image either"))


def _empty_file(path: Path) -> None:
    path.touch()


def _save(
    data: np.ndarray[Any, Any], path: Path, affine: np.ndarray[Any, Any] | None = None
) -> None:
    image = nib.nifti1.Nifti1Image(data, np.eye(4) if affine is None else affine)
    image.to_filename(path)


def _series(path: Path) -> None:
    _save(np.random.default_rng(0).random((20, 20, 5, 3)).astype(np.float32), path)


def _flat(path: Path) -> None:
    _save(np.random.default_rng(0).random((20, 20)).astype(np.float32), path)


def _complex(path: Path) -> None:
    _save(np.ones((20, 20, 5), np.complex64), path)


def _colour(path: Path) -> None:
    _save(np.zeros((20, 20, 5), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), path)


def _constant(path: Path) -> None:
    _save(np.full((20, 20, 5), 7, np.int16), path)


def _all_nan(path: Path) -> None:
    _save(np.full((20, 20, 5), np.nan, np.float32), path)


def _absurd_voxels(path: Path) -> None:
    volume, _ = head()
    _save(volume.data, path, np.diag([900.0, 900.0, 900.0, 1.0]))


def _singular(path: Path) -> None:
    volume, _ = head()
    affine = np.diag([4.0, 4.0, 10.0, 1.0])
    affine[1] = affine[0]
    header = nib.nifti1.Nifti1Header()
    image = nib.nifti1.Nifti1Image(volume.data, None, header)
    image.set_sform(affine, code=1, update_affine=False)
    image.to_filename(path)


def _huge(path: Path) -> None:
    header = nib.nifti1.Nifti1Header()
    header.set_data_dtype(np.float32)
    header["dim"] = (3, 3000, 3000, 3000, 1, 1, 1, 1)
    header["pixdim"][:4] = 1.0
    header["magic"] = b"n+1"
    header["vox_offset"] = 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(2000)))


BAD_INPUTS = (
    _absent,
    _folder_without_images,
    _truncated,
    _text,
    _packed_text,
    _empty_file,
    _series,
    _flat,
    _complex,
    _colour,
    _constant,
    _all_nan,
    _absurd_voxels,
    _singular,
    _huge,
)


@pytest.mark.parametrize("make", BAD_INPUTS, ids=lambda make: make.__name__.strip("_"))
class TestBadInput:
    def test_alone(self, make: Callable[[Path], None], tmp_path: Path, run: Run) -> None:
        make(tmp_path / "bad.nii.gz")
        result = run("bad.nii.gz")
        assert result.exit_code == 1
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert "bad.nii.gz" in line
        assert line.endswith((".", "?"))
        assert "Unexpected" not in line
        assert not (tmp_path / "out").exists()

    def test_among_good_ones(self, make: Callable[[Path], None], tmp_path: Path, run: Run) -> None:
        make(tmp_path / "bad.nii.gz")
        write_head(tmp_path / "good.nii.gz")
        result = run("bad.nii.gz", "good.nii.gz")
        assert result.exit_code == 1
        assert names(tmp_path / "out") == outputs_of("good") | {"wmh.tsv", "wmh.html"}


class TestTrouble:
    def test_unwritable_output(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a.nii.gz")
        (tmp_path / "file").touch()
        result = run("a.nii.gz", out="file/out")
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert "output folder" in result.stderr

    def test_disk_full(self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        write_head_without_sync(tmp_path / "a.nii")
        result = run("a.nii")
        assert result.exit_code == 1
        assert "no space is left on the disk" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (WeightsError("The base weights are absent; run `wmh-lora models pull`."), 2),
            (DeviceError("No such device."), 2),
            (ValueError("nobody\nforesaw this"), 1),
        ],
    )
    def test_the_model_cannot_be_loaded(
        self,
        error: Exception,
        code: int,
        tmp_path: Path,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(name: str, **_: object) -> None:
            raise error

        monkeypatch.setattr("wmh_lora.engine.load_model", fail)
        write_head(tmp_path / "a.nii.gz")
        result = run("a.nii.gz")
        assert result.exit_code == code
        (line,) = result.stderr.splitlines()
        assert str(error).split()[0] in line
        assert not (tmp_path / "out").exists()

    def test_absent_device(self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        write_head(tmp_path / "a.nii.gz")
        result = run("a.nii.gz", options=("--device", "cuda"))
        assert result.exit_code == 2
        assert "cuda is not available" in result.stderr

    @pytest.mark.parametrize(
        "options",
        [("--threshold", "1"), ("--min-voxels", "-1"), ("--tta", "all"), ("--threads", "0")],
    )
    def test_settings_out_of_range(
        self, options: tuple[str, ...], tmp_path: Path, run: Run
    ) -> None:
        assert run("a.nii.gz", options=options).exit_code == 2

    def test_debug_shows_the_traceback(self, tmp_path: Path) -> None:
        arguments = ["--debug", "segment", str(tmp_path / "absent.nii"), "-o", str(tmp_path / "o")]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr

    def test_warnings_of_the_reader_reach_user_and_report(self, tmp_path: Path, run: Run) -> None:
        volume, _ = head()
        image = nib.nifti1.Nifti1Image(volume.data, volume.affine)
        image.header.set_xyzt_units("meter")
        image.to_filename(tmp_path / "a.nii.gz")
        result = run("a.nii.gz")
        assert "warning:" in result.stderr
        report = json.loads((tmp_path / "out" / "a_wmh.json").read_text(encoding="utf-8"))
        assert report["warnings"][0].startswith("a.nii.gz: the header counts in metres")


def write_head_without_sync(path: Path) -> None:
    volume, _ = head()
    nib.nifti1.Nifti1Image(volume.data, volume.affine).to_filename(path)


def test_outputs_are_not_taken_for_inputs(tmp_path: Path, run: Run) -> None:
    """A second run over a folder that holds the results of the first finds the same scans."""
    write_head(tmp_path / "study" / "a.nii.gz")
    assert run("study", out="study/out").exit_code == 0
    assert run("study", out="study/out", options=("--overwrite",)).exit_code == 0
    assert len(table(tmp_path / "study" / "out" / "wmh.tsv")) == 1
    assert Volume.read(tmp_path / "study" / "a.nii.gz").shape == head()[0].shape


class TestPipeline:
    """The next scan is read and the last one written while the network works."""

    def test_lines_keep_the_order_of_the_scans(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = Segmentation.save

        def slow_at_first(self: Segmentation, *arguments: Any, **options: Any) -> Any:
            if options["stem"] == "a":
                time.sleep(0.3)
            return save(self, *arguments, **options)

        monkeypatch.setattr(Segmentation, "save", slow_at_first)
        for name in "acd":
            write_head(tmp_path / "study" / f"{name}.nii.gz")
        (tmp_path / "study" / "b.nii.gz").write_text("not an image")
        result = run("study")
        assert result.exit_code == 1
        lines = [line.strip() for line in result.output.splitlines()]
        starts = [line.split(":")[0] for line in lines if ": 4.48 mL" in line or "b.nii" in line]
        assert starts == ["a", "wmh-lora", "c", "d"]

    def test_no_more_than_one_result_waits(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alive, most = [0], [0]
        segment, save = WMHInferenceEngine.segment, Segmentation.save

        def counted(self: WMHInferenceEngine, *arguments: Any, **options: Any) -> Segmentation:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return segment(self, *arguments, **options)

        def slow(self: Segmentation, *arguments: Any, **options: Any) -> Any:
            time.sleep(0.1)
            saved = save(self, *arguments, **options)
            alive[0] -= 1
            return saved

        monkeypatch.setattr(WMHInferenceEngine, "segment", counted)
        monkeypatch.setattr(Segmentation, "save", slow)
        for number in range(4):
            write_head(tmp_path / "study" / f"{number}.nii.gz")
        assert run("study").exit_code == 0
        assert most == [2]
        assert run("study", out="alone", options=("--max-memory", "8G")).exit_code == 0
        most[0] = 0
        assert run("study", out="again", options=("--max-memory", "8G")).exit_code == 0
        assert most == [1]

    def test_warnings_stay_with_their_scan(self, tmp_path: Path, run: Run) -> None:
        for name in "abc":
            volume, _ = head()
            image = nib.nifti1.Nifti1Image(volume.data, volume.affine)
            if name == "b":
                image.header.set_xyzt_units("meter")
            (tmp_path / "study").mkdir(exist_ok=True)
            image.to_filename(tmp_path / "study" / f"{name}.nii.gz")
        assert run("study").exit_code == 0
        for name in "abc":
            report = json.loads((tmp_path / "out" / f"{name}_wmh.json").read_text("utf-8"))
            assert len(report["warnings"]) == (name == "b")

    def test_speed_settings_reach_the_report(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a.nii.gz")
        options = ("--tta", "d4", "--no-adaptive", "--precision", "float32")
        assert run("a.nii.gz", options=options).exit_code == 0
        report = json.loads((tmp_path / "out" / "a_wmh.json").read_text("utf-8"))
        assert report["settings"]["adaptive"] is False
        assert report["settings"]["precision"] == "float32"

    def test_too_little_memory_is_said(self, tmp_path: Path, run: Run) -> None:
        write_head(tmp_path / "a.nii.gz")
        result = run("a.nii.gz", options=("--max-memory", "10M"))
        assert result.exit_code == 1
        assert "within 10M of memory; it takes" in result.stderr
        assert run("a.nii.gz", options=("--max-memory", "lots")).exit_code == 2

    def test_backend_takes_the_place_of_the_network(
        self, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = BrightnessNet()
        asked: list[str] = []

        def replaced(model: object, name: str) -> BrightnessNet:
            asked.append(name)
            return other

        monkeypatch.setattr("wmh_lora.models.backends.with_backend", replaced)
        write_head(tmp_path / "a.nii.gz")
        assert run("a.nii.gz", options=("--backend", "onnxruntime")).exit_code == 0
        assert asked == ["onnxruntime"]
        assert other.seen_shapes
        assert run("a.nii.gz", out="b").exit_code == 0
        assert asked == ["onnxruntime"]
