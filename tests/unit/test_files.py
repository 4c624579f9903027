"""Names, folder search and atomic writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from wmh_lora.errors import DataError
from wmh_lora.files import find_images, image_stem, image_suffix, open_atomic


def _touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("sub-01_FLAIR.nii.gz", "sub-01"),
        ("sub-01_ses-2_FLAIR.nii", "sub-01_ses-2"),
        ("patient_flair.mgz", "patient"),
        ("FLAIR.nii.gz", "FLAIR"),
        ("flair.nrrd", "flair"),
        ("_FLAIR.nii.gz", "_FLAIR"),
        ("sub-01_Flair.nii.gz", "sub-01_Flair"),
        ("FLAIR_brain.nii.gz", "FLAIR_brain"),
        ("scan.v2_FLAIR.NII.GZ", "scan.v2"),
        ("scan.dcm", "scan"),
    ],
)
def test_image_stem(name: str, stem: str) -> None:
    assert image_stem(Path("some.folder") / name) == stem


def test_image_suffix_prefers_the_longest() -> None:
    assert image_suffix("a.nii.gz") == ".nii.gz"
    assert image_suffix("a.MGH") == ".mgh"
    assert image_suffix("a.gz") is None


def test_files_are_kept_as_given_and_absent_ones_too(tmp_path: Path) -> None:
    given = [*_touch(tmp_path, "b_mask.nii.gz", "a.txt"), tmp_path / "absent.nii"]
    assert find_images([*given, given[0]]) == given


def test_bids_folder_gives_flairs_only(tmp_path: Path) -> None:
    first, second = _touch(
        tmp_path, "sub-01/anat/sub-01_FLAIR.nii.gz", "sub-02/anat/sub-02_FLAIR.nii"
    )
    _touch(
        tmp_path,
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_FLAIR.json",
        "sub-01/anat/.sub-01_FLAIR.nii.gz",
        "sub-03/anat/sub-03_T1w.nii.gz",
        "derivatives/x/sub-01_FLAIR.nii.gz",
        ".git/annex/sub-09_FLAIR.nii.gz",
        "sub-01/anat/sub-01_label-WMH_mask_FLAIR.nii.gz",
        "sub-01/anat/sub-01_ses-1_space-halfway_FLAIR.nii.gz",
    )
    assert find_images([tmp_path]) == [first, second]


def test_a_derivatives_folder_may_be_given_itself(tmp_path: Path) -> None:
    (scan,) = _touch(tmp_path, "derivatives/sub-01_FLAIR.nii.gz")
    assert find_images([tmp_path / "derivatives"]) == [scan]


def test_other_folder_gives_all_scans_sorted(tmp_path: Path) -> None:
    scans = _touch(tmp_path, "a.nii", "b/c.mgz", "d.nrrd")
    _touch(tmp_path, "a_space-orig_label-WMH_mask.nii.gz", "a_probseg.nii.gz", "a_dseg.nii.gz")
    assert find_images([tmp_path]) == scans
    assert find_images([scans[2], tmp_path]) == [scans[2], scans[0], scans[1]]


def test_file_called_flair_stands_for_its_folder(tmp_path: Path) -> None:
    flair, _ = _touch(tmp_path, "p1/FLAIR.nii.gz", "p1/T1.nii.gz")
    assert find_images([tmp_path]) == [flair]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (scan,) = _touch(tmp_path, "store/s_FLAIR.nii.gz")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "s").symlink_to(scan.parent)
    (scan.parent / "loop").symlink_to(tmp_path / "study")
    assert find_images([tmp_path / "study"]) == [tmp_path / "study" / "s" / scan.name]


def test_defaced_scans_and_other_spellings_are_input(tmp_path: Path) -> None:
    scans = _touch(tmp_path, "a_maskface_FLAIR.nii.gz", "b_masked_Flair.nii.gz", "c_FLAIR.nii")
    assert find_images([tmp_path]) == scans


def test_folder_without_images_is_an_error(tmp_path: Path) -> None:
    _touch(tmp_path, "notes.txt", "x_mask.nii.gz")
    with pytest.raises(DataError, match=r"No image to segment in the folder .*\.nii\.gz"):
        find_images([tmp_path])


def test_open_atomic_writes_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    with open_atomic(target) as stream:
        stream.write(b"{}")
        assert not target.exists()
    assert target.read_bytes() == b"{}"
    assert list(tmp_path.iterdir()) == [target]


def test_open_atomic_keeps_an_existing_file_without_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    target.write_bytes(b"old")
    with pytest.raises(DataError, match=r"exists already.*--overwrite"), open_atomic(target):
        pytest.fail("the block must not run")
    with open_atomic(target, overwrite=True) as stream:
        stream.write(b"new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("failure", [ValueError("wrong"), KeyboardInterrupt()])
def test_open_atomic_cleans_up_when_the_block_fails(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "out.json"
    target.write_bytes(b"old")

    def write_half() -> None:
        with open_atomic(target, overwrite=True) as stream:
            stream.write(b"half")
            raise failure

    with pytest.raises(type(failure)):
        write_half()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space is left"),
        (errno.EDQUOT, "no space is left"),
        (errno.EIO, "nput/output error"),
    ],
)
def test_open_atomic_explains_a_late_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match=words), open_atomic(tmp_path / "out.json") as stream:
        stream.write(b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_open_atomic_explains_missing_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="no permission to write in"), open_atomic(tmp_path / "o"):
        pytest.fail("the block must not run")


def test_open_atomic_names_a_missing_folder_and_a_folder_as_target(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="not an existing folder"),
        open_atomic(tmp_path / "no" / "out.json"),
    ):
        pytest.fail("the block must not run")
    with pytest.raises(DataError, match="is a folder"), open_atomic(tmp_path, overwrite=True):
        pytest.fail("the block must not run")


def test_names_that_are_too_long_are_told_in_a_sentence(tmp_path: Path) -> None:
    long = tmp_path / f"{'x' * 300}.nii.gz"
    assert find_images([long]) == [long]
    with pytest.raises(DataError, match="name too long"), open_atomic(long):
        pass


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "mask.nii"

    def save() -> None:
        with open_atomic(target) as stream:
            stream.write(b"ours")
            target.write_bytes(b"theirs")

    with pytest.raises(DataError, match="exists already"):
        save()
    assert target.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_files_appear_where_the_file_system_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with open_atomic(tmp_path / "mask.nii") as stream:
        stream.write(b"ours")
    assert (tmp_path / "mask.nii").read_bytes() == b"ours"
