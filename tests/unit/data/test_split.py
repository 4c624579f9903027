"""Divisions of subjects: nobody in two parts, balanced, and the same again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from wmh_lora.data.manifest import Manifest, Scan, write_manifest
from wmh_lora.data.split import (
    PARTS,
    Split,
    leave_one_site_out,
    read_split,
    split_folds,
    split_fractions,
    write_split,
)
from wmh_lora.errors import ConfigError, DataError

_BAND_LOADS_ML = (1.0, 5.0, 20.0)


def scan(subject: str, site: str, load_ml: float, session: str = "", image: str = "") -> Scan:
    path = f"{subject}_{session}.nii.gz"
    return Scan(
        subject=subject, session=session, run="", site=site, usable=True,
        image=path, image_sha256=image or f"of {path}", mask="m", mask_sha256="m", t1="",
        t1_sha256="", shape=(20, 20, 5), spacing_mm=(1.0, 1.0, 3.0), reference_ml=load_ml,
        ignored_ml=0.0, labels=(0, 1), problems=(),
    )  # fmt: skip


def manifest(scans: Sequence[Scan]) -> Manifest:
    return Manifest(root=Path(), layout="flat", scans=tuple(scans))


@st.composite
def cohorts(draw: st.DrawFn, min_subjects: int = 12, min_sites: int = 1) -> list[Scan]:
    """Subjects of some sites, with visits, and some who share an image with the one before."""
    count = draw(st.integers(min_subjects, 60))
    sites = draw(st.integers(min_sites, 4))
    scans: list[Scan] = []
    for number in range(count):
        site = f"site{number % sites if number < sites else draw(st.integers(0, sites - 1))}"
        load_ml = draw(st.sampled_from(_BAND_LOADS_ML))
        visits = draw(st.integers(1, 3))
        scans += [scan(f"p{number:02d}", site, load_ml, f"{v}") for v in range(visits)]
    if draw(st.booleans()):
        first = scans[0]
        scans.append(replace(scan("twin", first.site, 5.0), image_sha256=first.image_sha256))
    return scans


def subjects(scans: Sequence[Scan]) -> set[str]:
    return {s.subject for s in scans}


def assert_divides(split: Split, scans: Sequence[Scan]) -> None:
    """Everybody once, and nobody apart from an equal image."""
    everybody = [*split.train, *split.validation, *split.test]
    assert len(everybody) == len(set(everybody))
    assert set(everybody) == subjects(scans)
    part_of = {name: part for part in PARTS for name in split.part(part)}
    for digest in {s.image_sha256 for s in scans}:
        assert len({part_of[s.subject] for s in scans if s.image_sha256 == digest}) == 1


@given(cohorts(), st.integers(0, 5), st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.3, 0.2)]))
def test_fractions(scans: list[Scan], seed: int, fractions: tuple[float, ...]) -> None:
    split = split_fractions(manifest(scans), fractions, seed=seed).split()
    assert_divides(split, scans)
    twins = int("twin" in subjects(scans))  # two subjects, but one person
    stratum = {s.subject: (s.site, s.reference_ml) for s in scans}
    for name, fraction in zip(PARTS, fractions):
        persons = len(subjects(scans)) - twins
        assert abs(len(split.part(name)) - fraction * persons) <= 0.75 + twins
        for level in range(2):  # sites, then sites with their bands
            whole = Counter(key[: level + 1] for key in stratum.values())
            held = Counter(stratum[s][: level + 1] for s in split.part(name))
            for key, count in whole.items():
                # a twin is not counted in its own band, at most one of either sign
                assert abs(held[key] - fraction * count) <= 1.5 + 2 * twins


@given(cohorts(), st.integers(3, 6))
def test_folds(scans: list[Scan], folds: int) -> None:
    made = split_folds(manifest(scans), folds)
    for split in made.splits:
        assert_divides(split, scans)
        assert split.train
        assert split.validation
    tested = [name for split in made.splits for name in split.test]
    assert sorted(tested) == sorted(subjects(scans))
    if "twin" in subjects(scans):
        return
    for key in {None, *(s.site for s in scans)}:
        chosen = {s.subject for s in scans if key in (None, s.site)}
        sizes = [len(chosen & set(split.test)) for split in made.splits]
        assert max(sizes) - min(sizes) <= 1


@given(cohorts(min_subjects=24, min_sites=2))
def test_leave_one_site_out(scans: list[Scan]) -> None:
    sites = {s.site for s in scans}
    assume(all(len(subjects([s for s in scans if s.site != site])) > 5 for site in sites))
    made = leave_one_site_out(manifest(scans), (0.6, 0.3, 0.1))
    assert [s.name for s in made.splits] == sorted({f"without-{s.site}" for s in scans})
    for split in made.splits:
        assert_divides(split, scans)
        site = split.name.removeprefix("without-")
        assert set(split.test) == {s.subject for s in scans if s.site == site}


@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_the_manifest_does_not_matter(scans: list[Scan], random: object) -> None:
    shuffled = list(scans)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for divide in (split_fractions, lambda m: split_folds(m, 4)):
        assert divide(manifest(scans)).splits == divide(manifest(shuffled)).splits


def test_the_seed_matters_and_is_enough() -> None:
    scans = [scan(f"p{n}", "a", 5.0) for n in range(30)]
    one, again, other = (split_fractions(manifest(scans), seed=seed) for seed in (1, 1, 2))
    assert one.splits == again.splits
    assert one.splits != other.splits


def test_chains_of_equal_images_stay_together() -> None:
    scans = [scan(f"p{n}", "a", 5.0) for n in range(20)]
    chain = ["p3", "p7", "p19", "p0"]
    for first, second in pairwise(chain):
        link = f"{first}-{second}"
        scans += [scan(name, "a", 5.0, link, image=link) for name in (first, second)]
    split = split_fractions(manifest(scans)).split()
    assert_divides(split, scans)
    assert sum(set(chain) <= set(split.part(part)) for part in PARTS) == 1


def test_unusable_scans_are_left_out() -> None:
    scans = [scan(f"p{n}", "a", 5.0) for n in range(20)]
    scans[4] = replace(scans[4], usable=False)
    made = split_fractions(manifest(scans))
    assert_divides(made.split(), [s for s in scans if s.usable])
    assert scans[4].image not in made.images


def test_a_part_may_be_empty_if_it_is_meant() -> None:
    scans = [scan(f"p{n}", "a", 5.0) for n in range(4)]
    split = split_fractions(manifest(scans), (0.75, 0.25, 0.0)).split()
    assert (len(split.train), len(split.validation), len(split.test)) == (3, 1, 0)


@pytest.mark.parametrize(
    "fractions", [(0.7, 0.2, 0.2), (0.7, 0.3), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)]
)
def test_shares_must_add_up(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"add up to 1"):
        split_fractions(manifest([scan("p", "a", 1.0)]), fractions)


def test_too_few_subjects() -> None:
    few = manifest([scan("p1", "a", 1.0), scan("p2", "b", 1.0)])
    with pytest.raises(DataError, match=r"Too few subjects \(2\).*part (validation|test)"):
        split_fractions(few)
    with pytest.raises(DataError, match=r"Too few subjects \(2\) to fill 5 folds"):
        split_folds(few, 5)
    with pytest.raises(ConfigError, match="2 folds leave nothing"):
        split_folds(few, 2)
    with pytest.raises(DataError, match="part validation of without-a would be empty"):
        leave_one_site_out(few)
    with pytest.raises(DataError, match="None of the 1 scans"):
        split_fractions(manifest([replace(scan("p", "a", 1.0), usable=False)]))


def test_sites_that_cannot_be_left_out() -> None:
    scans = [scan(f"p{n}", "a", 1.0) for n in range(9)]
    with pytest.raises(DataError, match=r"two sites at least.*of 1 \(a\)"):
        leave_one_site_out(manifest(scans))
    traveller = [*scans, scan("p0", "b", 1.0, "2")]
    with pytest.raises(DataError, match=r"p0 belongs? to one person with scans of several sites"):
        leave_one_site_out(manifest(traveller))


def test_a_site_with_one_subject_can_be_left_out() -> None:
    scans = [*(scan(f"p{n}", "a", 1.0) for n in range(12)), scan("q", "b", 1.0)]
    with pytest.raises(DataError, match="part validation of without-a"):
        leave_one_site_out(manifest(scans))
    (without_a, without_b) = leave_one_site_out(manifest(scans), (1.0, 0.0, 0.0)).splits
    assert without_b.test == ("q",)
    assert without_a.train == ("q",)


def test_split_file_belongs_to_its_manifest(tmp_path: Path) -> None:
    scans = [scan(f"p{n}", "a", 5.0) for n in range(12)]
    stored = write_manifest(manifest(scans), tmp_path / "m.json")
    made = split_fractions(stored)
    write_split(made, tmp_path / "s.json")
    assert read_split(tmp_path / "s.json", stored) == made
    assert made.images == {s.image: s.image_sha256 for s in scans}
    assert made.manifest_sha256 == stored.sha256
    with pytest.raises(DataError, match="exists already"):
        write_split(made, tmp_path / "s.json")
    other = write_manifest(manifest(scans[1:]), tmp_path / "other.json")
    with pytest.raises(DataError, match="made for another manifest"):
        read_split(tmp_path / "s.json", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "x"}, "is not a split"),
        ({"format": 9}, "format 9"),
        ({"seed": "x"}, "damaged split"),
        ({"extra": 1}, "damaged split"),
    ],
)
def test_other_files_are_no_splits(tmp_path: Path, change: dict[str, object], message: str) -> None:
    cohort = manifest([scan(f"p{n}", "a", 5.0) for n in range(12)])
    path = tmp_path / "s.json"
    write_split(split_fractions(cohort), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        read_split(path, cohort)


def test_the_split_is_chosen_by_name() -> None:
    made = split_folds(manifest([scan(f"p{n}", "a", 5.0) for n in range(12)]), 3)
    assert made.split("fold-2").name == "fold-2"
    with pytest.raises(ConfigError, match="fold-1, fold-2, fold-3"):
        made.split()
