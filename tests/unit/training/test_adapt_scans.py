"""Scans of a site: checked together, and dealt to folds by person."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.phantoms import head
from tests.site_scans import write_site
from wmh_lora.config_reading import from_dict
from wmh_lora.data.sources import DataConfig, read_labelled
from wmh_lora.errors import DataError
from wmh_lora.files import file_sha256
from wmh_lora.training.adapt_scans import WHOLE, SiteScans
from wmh_lora.volume import write_nifti


def _gather(cases, folder: Path, folds: int = 3) -> SiteScans:
    copies = folder / "copies"
    copies.mkdir()
    return SiteScans.gather(cases, copies, folds=folds, seed=42)


@pytest.mark.parametrize(("count", "sizes"), [(2, [1, 1]), (3, [1, 1, 1]), (5, [1, 2, 2])])
def test_folds_hold_every_scan_once(tmp_path: Path, count: int, sizes: list[int]) -> None:
    scans = _gather(write_site(tmp_path / "site", count), tmp_path)
    assert sorted(len(fold) for fold in scans.folds) == sizes
    assert sorted(n for fold in scans.folds for n in fold) == list(range(count))


def test_scans_of_one_person_are_in_one_fold(tmp_path: Path) -> None:
    cases = write_site(tmp_path / "site", 6)
    cases = [replace(case, subject=f"s{n // 2}") for n, case in enumerate(cases[:4])] + cases[4:]
    # the image of another subject: the same person under another name
    cases[5].image.write_bytes(cases[0].image.read_bytes())
    scans = _gather(cases, tmp_path)
    fold_of = {n: number for number, fold in enumerate(scans.folds) for n in fold}
    assert fold_of[0] == fold_of[1] == fold_of[5]
    assert fold_of[2] == fold_of[3]
    assert len(scans.folds) == 3


def test_a_fold_trains_on_the_others_and_all_are_labelled_as_given(tmp_path: Path) -> None:
    cases = write_site(tmp_path / "site", 3)
    scans = _gather(cases, tmp_path)
    brain = scans.manifest.root / "brain.nii.gz"
    volume, mask = head()
    write_nifti(brain, mask, volume)
    table = scans.data_table([{"brain": brain}] * 3)
    for number, held_out in enumerate(scans.folds, start=1):
        config = from_dict(DataConfig, {**table, "fold": f"fold-{number}"})
        train = {scan.image_sha256 for scan in read_labelled(config, "train").scans}
        test = {file_sha256(cases[n].image) for n in held_out}
        assert len(train) == 2
        assert not train & test
    part = read_labelled(from_dict(DataConfig, {**table, "fold": WHOLE}), "train", verify=True)
    assert [scan.image_sha256 for scan in part.scans] == [file_sha256(c.image) for c in cases]
    assert [name for name, _ in part.masks(part.scans[0])] == ["wmh", "brain"]


def test_checksums_are_those_of_the_users_files(tmp_path: Path) -> None:
    cases = write_site(tmp_path / "site", 2)
    for identity, case in zip(_gather(cases, tmp_path).identities, cases, strict=True):
        assert case.reference is not None
        assert identity == {
            "image_sha256": file_sha256(case.image),
            "mask_sha256": file_sha256(case.reference),
        }


@pytest.mark.parametrize("count", [0, 1, 11])
def test_too_few_and_too_many_scans_are_refused(tmp_path: Path, count: int) -> None:
    cases = write_site(tmp_path / "site", 1) * count
    with pytest.raises(DataError, match=f"2 to 10 labelled scans, found {count}"):
        _gather(cases, tmp_path)


def test_scans_of_one_person_alone_are_refused(tmp_path: Path) -> None:
    cases = [replace(case, subject="one") for case in write_site(tmp_path / "site", 2)]
    with pytest.raises(DataError, match="of one person"):
        _gather(cases, tmp_path)


def test_all_scans_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    cases = write_site(tmp_path / "site", 5)
    volume, mask = head()
    wrong = {
        0: np.zeros_like(mask),
        1: np.where(mask > 0, 7, 0).astype(np.uint8),
        3: mask[:, :, :-1],
    }
    for number, labels in wrong.items():
        reference = cases[number].reference
        assert reference is not None
        like = replace(volume, data=volume.data[..., : labels.shape[2]])
        write_nifti(reference, labels, like, overwrite=True)
    cases[4] = replace(cases[4], reference=None)
    with pytest.raises(DataError, match=r"p4_FLAIR.* has no reference mask"):
        _gather(cases, tmp_path)
    (tmp_path / "copies").rename(tmp_path / "before")
    with pytest.raises(DataError, match="3 of the 4 scans") as caught:
        _gather(cases[:4], tmp_path)
    message = str(caught.value)
    for number, reason in (
        (0, "holds no lesion"),
        (1, "holds the values"),
        (3, "image and mask: "),
    ):
        assert str(cases[number].image) in message
        assert reason in message
    assert str(cases[2].image) not in message
