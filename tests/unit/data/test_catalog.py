"""Manifests of small folders of real files, good and bad."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from wmh_lora.data.catalog import make_manifest
from wmh_lora.data.manifest import Manifest, Scan, read_manifest, write_manifest
from wmh_lora.errors import ConfigError, DataError
from wmh_lora.volume import GRID_TOLERANCE, Volume, write_nifti

SHAPE = (20, 18, 5)
SPACING_MM = (1.0, 1.25, 4.0)


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*SPACING_MM, 1.0]) if affine is None else affine
    like = Volume(np.zeros(data.shape, np.float32), affine)
    write_nifti(path, data, like, overwrite=True)
    return path


def image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 10, shape).astype(np.float32)


def mask(*values: float) -> np.ndarray:
    """Ten voxels of each value."""
    data = np.zeros(SHAPE, np.float32)
    for index, value in enumerate(values):
        data[:10, index, 2] = value
    return data


def pair(folder: Path, name: str, seed: int, labels: np.ndarray | None = None) -> None:
    write(folder / f"{name}_FLAIR.nii.gz", image(seed))
    write(folder / f"{name}_mask.nii.gz", mask(1) if labels is None else labels)


def only(manifest: Manifest) -> Scan:
    (scan,) = manifest.scans
    return scan


def codes(scan: Scan) -> set[str]:
    return {problem.code for problem in scan.problems}


def test_a_scan_is_measured(tmp_path: Path) -> None:
    subject = tmp_path / "training" / "Utrecht" / "7"
    write(subject / "pre" / "FLAIR.nii.gz", image())
    write(subject / "pre" / "T1.nii.gz", image(1))
    write(subject / "wmh.nii.gz", mask(1, 2, 2))
    manifest = make_manifest(tmp_path)
    scan = only(manifest)
    assert (manifest.layout, scan.name, scan.site) == ("challenge", "training-Utrecht-7", "Utrecht")
    assert scan.usable
    assert scan.problems == ()
    assert scan.shape == SHAPE
    assert scan.spacing_mm == SPACING_MM
    assert scan.labels == (0, 1, 2)
    assert scan.reference_ml == pytest.approx(10 * 5.0 / 1000)
    assert scan.ignored_ml == pytest.approx(20 * 5.0 / 1000)
    assert len(scan.hashes) == 3


def test_labels_may_be_rounded_badly(tmp_path: Path) -> None:
    pair(tmp_path, "p", 0, mask(0.9999999, 2.0000002))
    scan = only(make_manifest(tmp_path))
    assert scan.usable
    assert scan.labels == (0, 1, 2)


@pytest.mark.parametrize(
    ("labels", "code", "usable"),
    [
        (mask(), "empty-mask", True),
        (mask(2), "empty-mask", True),
        (mask(255), "label-values", False),
        (mask(0.00001), "label-values", False),
        (mask(1, 0.5), "label-values", False),
        (mask(1, np.nan), "label-values", False),
        (mask(1, -1), "label-values", False),
        (image(3, (20, 18, 6)), "grid-mismatch", False),
    ],
)
def test_masks_that_need_a_look(
    tmp_path: Path, labels: np.ndarray, code: str, usable: bool
) -> None:
    pair(tmp_path, "p", 0, labels)
    scan = only(make_manifest(tmp_path))
    assert code in codes(scan)
    assert scan.usable is usable
    assert (scan.reference_ml is None) is not usable


@pytest.mark.parametrize(("share", "fits"), [(0.5, True), (2.0, False)])
def test_affines_agree_within_the_tolerance(tmp_path: Path, share: float, fits: bool) -> None:
    pair(tmp_path, "p", 0)
    affine = np.diag([*SPACING_MM, 1.0])
    affine[0, 3] = share * GRID_TOLERANCE * min(SPACING_MM)
    write(tmp_path / "p_mask.nii.gz", mask(1), affine)
    scan = only(make_manifest(tmp_path))
    assert scan.usable is fits
    assert ("grid-mismatch" in codes(scan)) is not fits


def test_flipped_mask_of_equal_shape_is_noticed(tmp_path: Path) -> None:
    pair(tmp_path, "p", 0)
    write(tmp_path / "p_mask.nii.gz", mask(1), np.diag([-1.0, 1.25, 4.0, 1.0]))
    assert codes(only(make_manifest(tmp_path))) == {"grid-mismatch"}


def test_every_bad_file_is_kept_and_marked(tmp_path: Path) -> None:
    for seed, name in enumerate("abcde"):
        pair(tmp_path, name, seed)
    (tmp_path / "a_FLAIR.nii.gz").write_bytes(b"no image")
    damaged = (tmp_path / "b_mask.nii.gz").read_bytes()
    (tmp_path / "b_mask.nii.gz").write_bytes(damaged[: len(damaged) // 2])
    (tmp_path / "c_mask.nii.gz").unlink()
    elsewhere = np.diag([*SPACING_MM, 1.0])
    elsewhere[0, 3] = 500.0
    write(tmp_path / "d_T1.nii.gz", image(9), elsewhere)
    write(tmp_path / "e_T1.nii.gz", image(10, (16, 16, 16)))
    (tmp_path / "c_T1.nii.gz").write_bytes(b"")
    manifest = make_manifest(tmp_path)
    found = {scan.name: (codes(scan), scan.usable) for scan in manifest.scans}
    assert found == {
        "a": ({"unreadable-image"}, False),
        "b": ({"unreadable-mask"}, False),
        "c": ({"missing-mask", "unreadable-t1"}, False),
        "d": ({"t1-apart"}, True),
        "e": (set(), True),
    }
    text = " ".join(p.message for scan in manifest.scans for p in scan.problems)
    assert str(tmp_path) not in text
    assert [scan.name for scan in manifest.usable] == ["d", "e"]
    assert [scan.usable_t1 for scan in manifest.usable] == ["", "e_T1.nii.gz"]
    # the bytes of a damaged file are still pinned
    assert manifest.scans[0].image_sha256


def test_equal_images_of_two_subjects_are_noted(tmp_path: Path) -> None:
    for name in "abc":
        pair(tmp_path, name, 0 if name != "c" else 1)
    first, second, third = make_manifest(tmp_path).scans
    assert "the same image file as b" in first.problems[0].message
    assert "the same image file as a" in second.problems[0].message
    assert third.problems == ()
    assert first.usable


def test_participants_table_names_sites(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write(tmp_path / f"sub-{name}" / "anat" / f"sub-{name}_FLAIR.nii.gz", image())
    (tmp_path / "participants.tsv").write_text(
        'participant_id\tnote\tsite\n1\t"quiet\tDelft\nsub-2\t"loud\tn/a\n'
    )
    manifest = make_manifest(tmp_path)
    assert manifest.layout == "bids"
    assert {scan.subject: scan.site for scan in manifest.scans} == {
        "sub-1": "Delft",
        "sub-2": tmp_path.name,
    }


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_channels_are_read_from_the_description(tmp_path: Path, key: str) -> None:
    for channel in ("0000", "0001"):
        write(tmp_path / "imagesTr" / f"p_{channel}.nii.gz", image(int(channel)))
    write(tmp_path / "labelsTr" / "p.nii.gz", mask(1))
    (tmp_path / "dataset.json").write_text(json.dumps({key: {"0": "T1", "1": "FLAIR"}}))
    scan = only(make_manifest(tmp_path))
    assert (scan.image, scan.t1) == ("imagesTr/p_0001.nii.gz", "imagesTr/p_0000.nii.gz")
    assert scan.usable


@pytest.mark.parametrize(
    "document", [[], "FLAIR", {"modality": {"MR": "FLAIR"}}, {"channel_names": {"-1": "FLAIR"}}]
)
def test_descriptions_of_other_kinds_are_named(tmp_path: Path, document: object) -> None:
    write(tmp_path / "imagesTr" / "p_0000.nii.gz", image())
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"dataset\.json does not number the channels.*remove it"):
        make_manifest(tmp_path)


def test_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    pair(tmp_path / "elsewhere", "p", 0)
    study = tmp_path / "study"
    study.mkdir()
    (study / "linked").symlink_to(tmp_path / "elsewhere")
    (study / "again").symlink_to(study)
    assert [s.image for s in make_manifest(study).scans] == ["linked/p_FLAIR.nii.gz"]


def test_misuse_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No image in the folder"):
        make_manifest(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        make_manifest(tmp_path / "absent")
    pair(tmp_path, "p", 0)
    with pytest.raises(DataError, match=r"layout 'bids', which expects sub-"):
        make_manifest(tmp_path, "bids")
    with pytest.raises(ConfigError, match="--derivatives is for BIDS"):
        make_manifest(tmp_path, derivatives="manual")


def test_scans_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a b", "a_b"):
        pair(tmp_path / folder, "p", 0)
    with pytest.raises(DataError, match="would both be called"):
        make_manifest(tmp_path)


def test_manifest_is_the_same_again_and_moves_with_its_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("b", "a", "c"):
        pair(first / "scans", name, ord(name))
    shutil.copytree(first, second)
    stored = [
        write_manifest(make_manifest(place / "scans"), place / "m.json")
        for place in (first, second)
    ]
    assert (first / "m.json").read_bytes() == (second / "m.json").read_bytes()
    assert stored[0].sha256 == stored[1].sha256
    assert str(tmp_path) not in (first / "m.json").read_text()
    moved = first.rename(tmp_path / "third")
    again = read_manifest(moved / "m.json")
    assert again.scans == stored[0].scans
    assert again.root == moved / "scans"
    assert [scan.name for scan in again.scans] == ["a", "b", "c"]
    # One line a scan, for people who compare two manifests.
    assert sum('"subject"' in line for line in (moved / "m.json").read_text().splitlines()) == 3


def test_verification_names_every_file_that_is_not_the_same(tmp_path: Path) -> None:
    for name in "abc":
        pair(tmp_path / "scans", name, ord(name))
    path = tmp_path / "m.json"
    write_manifest(make_manifest(tmp_path / "scans"), path)
    changed, vanished = tmp_path / "scans" / "a_mask.nii.gz", tmp_path / "scans" / "b_FLAIR.nii.gz"
    before = changed.stat()
    data = bytearray(changed.read_bytes())
    data[-1] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time tell nothing
    vanished.unlink()
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert "2 of the 6 files" in str(caught.value)
    assert "a_mask.nii.gz (changed), b_FLAIR.nii.gz (vanished)" in str(caught.value)
    assert len(read_manifest(path, verify=False).scans) == 3


def test_manifest_can_be_read_with_another_root(tmp_path: Path) -> None:
    pair(tmp_path / "scans", "p", 0)
    write_manifest(make_manifest(tmp_path / "scans"), tmp_path / "m.json")
    (tmp_path / "scans").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="vanished"):
        read_manifest(tmp_path / "m.json")
    assert read_manifest(tmp_path / "m.json", root=tmp_path / "moved").usable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "no JSON"),
        (b"[]", "is not a manifest"),
        (b'{"kind": "wmh-lora manifest", "format": 99}', "format 99"),
        (b'{"kind": "wmh-lora manifest", "format": 1}', "damaged manifest"),
        (
            b'{"kind": "wmh-lora manifest", "format": 1, "layout": "flat", "root": ".",'
            b'"unmatched_masks": [], "scans": [{"subject": 3}]}',
            "damaged manifest",
        ),
    ],
)
def test_other_files_are_no_manifests(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path / "m.json")
    with pytest.raises(DataError, match="Cannot read the manifest"):
        read_manifest(tmp_path / "absent.json")


@pytest.mark.realdata
def test_real_folders(shared_data: Path) -> None:
    tabriz = make_manifest(shared_data / "tabriz")
    assert (tabriz.layout, len(tabriz.scans), len(tabriz.usable)) == ("bids", 10, 10)
    assert [scan.subject for scan in tabriz.scans if not scan.t1] == ["sub-03"]
    unlabelled = make_manifest(shared_data / "ljubljana-longitudinal")
    assert {code for scan in unlabelled.scans for code in codes(scan)} == {"missing-mask"}
    assert (len(unlabelled.scans), len({scan.subject for scan in unlabelled.scans})) == (11, 7)
