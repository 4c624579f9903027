"""A scan's files appear together or not at all."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wmh_lora.errors import ConfigError, DataError
from wmh_lora.postprocess import describe_lesions
from wmh_lora.report.outputs import Segmentation, output_files, output_folder, saved_together
from wmh_lora.volume import Volume


@pytest.fixture
def result() -> Segmentation:
    data = np.random.default_rng(1).random((24, 26, 5)).astype(np.float32)
    volume = Volume(data, np.diag([1.0, 1.0, 5.0, 1.0]))
    mask = (data > 0.9).astype(np.uint8)
    return Segmentation(
        volume=volume,
        probability=data,
        mask=mask,
        lesions=tuple(describe_lesions(mask, volume.affine)),
        volume_ml=float(mask.sum()) * volume.voxel_volume_ml,
        settings={"threshold": 0.9, "min_voxels": 0, "tta": "none"},
        model={"name": "test"},
    )


def test_saves_five_files_that_agree(tmp_path: Path, result: Segmentation) -> None:
    files = result.save(tmp_path / "new" / "out", stem="sub-01")
    assert files == output_files(tmp_path / "new" / "out", "sub-01")
    assert sorted(p.name for p in files.mask.parent.iterdir()) == sorted(
        p.name for p in files.present
    )
    mask = Volume.read(files.mask, allow_constant=True)
    np.testing.assert_array_equal(mask.data, result.mask)
    np.testing.assert_array_equal(mask.affine, result.volume.affine)
    np.testing.assert_array_equal(Volume.read(files.probability).data, result.probability)
    report = json.loads(files.report.read_text(encoding="utf-8"))
    assert report["lesion_count"] == len(result.lesions)
    with Image.open(files.picture) as picture:
        assert picture.format == "PNG"
    assert files.page is not None
    assert files.page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_saves_no_page_unless_asked(tmp_path: Path, result: Segmentation) -> None:
    files = result.save(tmp_path, stem="a", page="none")
    assert files.page is None
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in files.present)


def test_files_get_ordinary_permissions(tmp_path: Path, result: Segmentation) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    for path in result.save(tmp_path, stem="a").present:
        assert path.stat().st_mode == ordinary.stat().st_mode


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, result: Segmentation) -> None:
    first = [path.read_bytes() for path in result.save(tmp_path, stem="a").present]
    again = result.save(tmp_path, stem="a", overwrite=True)
    second = [path.read_bytes() for path in again.present]
    assert first == second


def test_existing_results_are_left_alone(tmp_path: Path, result: Segmentation) -> None:
    files = output_files(tmp_path, "scan")
    files.picture.write_text("precious")
    with pytest.raises(DataError, match="exists already"):
        result.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [files.picture.name]
    assert files.picture.read_text() == "precious"


def _fail(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "save", _fail)
    with pytest.raises(DataError, match="no space is left on the disk"):
        result.save(tmp_path / "out", stem="a")
    assert list(tmp_path.iterdir()) == []


def test_a_scan_that_is_gone_is_told_as_such(tmp_path: Path, result: Segmentation) -> None:
    """Its checksum goes into the report."""
    gone = replace(result, volume=replace(result.volume, path=tmp_path / "gone.nii.gz"))
    with pytest.raises(DataError, match="cannot be read any more"):
        gone.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_messages_do_not_name_temporary_files(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", _fail)
    with pytest.raises(DataError) as caught:
        result.save(tmp_path, stem="a")
    assert f"{output_files(tmp_path, 'a').mask}: no space is left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_rename_takes_back_what_was_placed(tmp_path: Path) -> None:
    targets = [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "old").write_text("old")
    with (
        pytest.raises(DataError, match="Cannot write"),
        saved_together(targets) as temporary,
    ):
        temporary[targets[0]].write_text("new")  # b is never written
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_a_failing_rename_puts_back_what_was_replaced(tmp_path: Path) -> None:
    targets = [tmp_path / "a", tmp_path / "b"]
    for target in targets:
        target.write_text("old")
    with (
        pytest.raises(DataError, match="Cannot write"),
        saved_together(targets, overwrite=True) as temporary,
    ):
        temporary[targets[0]].write_text("new")  # b is never written
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    targets = [tmp_path / "a", tmp_path / "b"]

    def save() -> None:
        with saved_together(targets) as temporary:
            for path in temporary.values():
                path.write_text("ours")
            targets[1].write_text("theirs")

    with pytest.raises(DataError, match="exists already"):
        save()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "theirs"}


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with saved_together([tmp_path / "deep" / "a"]) as temporary:
            temporary[tmp_path / "deep" / "a"].write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


class TestOutputFolder:
    def test_removes_what_it_made_if_nothing_was_put_there(self, tmp_path: Path) -> None:
        with output_folder(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()
        assert list(tmp_path.iterdir()) == []

    def test_keeps_what_holds_results(self, tmp_path: Path) -> None:
        with output_folder(tmp_path / "a" / "b"):
            (tmp_path / "a" / "b" / "result").touch()
        assert (tmp_path / "a" / "b" / "result").exists()

    def test_keeps_an_empty_folder_that_was_there(self, tmp_path: Path) -> None:
        with output_folder(tmp_path):
            pass
        assert tmp_path.is_dir()

    def test_refuses_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ConfigError, match="output folder"), output_folder(folder):
                pass

    def test_refuses_a_folder_without_permission(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(ConfigError, match="no permission"), output_folder(tmp_path / "a"):
            pass
