"""What the paths of a folder tell; no file exists here."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest

from wmh_lora.data.layouts import Found, Listing, list_bids, list_challenge, list_flat
from wmh_lora.errors import ConfigError


def paths(*names: str) -> list[PurePosixPath]:
    return sorted(PurePosixPath(f"{name}.nii.gz") for name in names)


def pairs(listing: Listing) -> dict[str, tuple[str, ...]]:
    """Image and masks by subject, without the extension."""
    return {s.subject: tuple(map(_bare, (s.image, *s.masks))) for s in listing.scans}


def _bare(path: PurePosixPath) -> str:
    return str(path).removesuffix(".nii.gz")


def only(listing: Listing) -> Found:
    (scan,) = listing.scans
    return scan


def test_challenge_knows_parts_sites_and_scanners() -> None:
    subjects = (
        "training/Utrecht/0",
        "training/Singapore/50",
        "training/Amsterdam/GE3T/100",
        "test/Amsterdam/Philips_VU .PETMR_01./161",
        "test/Utrecht/0",
    )
    files = ("pre/FLAIR", "pre/T1", "pre/3DT1", "orig/FLAIR", "orig/T1", "orig/FLAIR_mask", "wmh")
    observer = "additional_annotations/observer_o3/training/Utrecht/0/result"
    listing = list_challenge(paths(observer, *(f"{s}/{f}" for s in subjects for f in files)), "x")

    assert {(s.subject, s.site) for s in listing.scans} == {
        ("training-Utrecht-0", "Utrecht"),
        ("training-Singapore-50", "Singapore"),
        ("training-Amsterdam-GE3T-100", "Amsterdam-GE3T"),
        ("test-Amsterdam-Philips_VU_.PETMR_01-161", "Amsterdam-Philips_VU_.PETMR_01"),
        ("test-Utrecht-0", "Utrecht"),
    }
    scan = next(s for s in listing.scans if s.subject == "training-Utrecht-0")
    assert [_bare(p) for p in (scan.image, *scan.masks, scan.t1) if p] == [
        "training/Utrecht/0/pre/FLAIR",
        "training/Utrecht/0/wmh",
        "training/Utrecht/0/pre/T1",
    ]


@pytest.mark.parametrize(
    ("names", "subject", "site", "image"),
    [
        (("Utrecht/0/pre/FLAIR", "Utrecht/0/wmh"), "Utrecht-0", "Utrecht", "Utrecht/0/pre/FLAIR"),
        (("0/orig/FLAIR", "0/wmh"), "0", "root", "0/orig/FLAIR"),
        (("0/FLAIR", "0/wmh"), "0", "root", "0/FLAIR"),
        (("pre/FLAIR", "wmh"), "root", "root", "pre/FLAIR"),
        (
            ("wmh_data/training/Utrecht/0/pre/FLAIR", "wmh_data/training/Utrecht/0/wmh"),
            "training-Utrecht-0",
            "Utrecht",
            "wmh_data/training/Utrecht/0/pre/FLAIR",
        ),
    ],
)
def test_challenge_starts_at_any_folder(
    names: tuple[str, ...], subject: str, site: str, image: str
) -> None:
    scan = only(list_challenge(paths(*names), "root"))
    assert (scan.subject, scan.site, _bare(scan.image)) == (subject, site, image)
    assert len(scan.masks) == 1


def test_challenge_names_masks_without_a_scan() -> None:
    listing = list_challenge(paths("a/0/wmh", "a/1/pre/FLAIR"), "root")
    assert [_bare(mask) for mask in listing.unmatched_masks] == ["a/0/wmh"]
    assert only(listing).masks == ()


def test_bids_matches_sessions_and_runs() -> None:
    manual = "derivatives/manual"
    listing = list_bids(
        paths(
            "sub-1/ses-a/anat/sub-1_ses-a_run-1_FLAIR",
            "sub-1/ses-a/anat/sub-1_ses-a_run-2_FLAIR",
            "sub-1/ses-a/anat/sub-1_ses-a_run-2_T1w",
            "sub-1/ses-b/anat/sub-1_ses-b_FLAIR",
            "sub-1/ses-b/anat/sub-1_ses-b_T1w",
            f"{manual}/sub-1/ses-a/anat/sub-1_ses-a_run-2_label-WMH_mask",
            f"{manual}/sub-1/ses-b/anat/sub-1_ses-b_space-orig_label-WMH_mask",
            f"{manual}/sub-1/ses-b/anat/sub-1_ses-b_label-brain_mask",
            f"{manual}/sub-1/ses-b/anat/sub-1_ses-b_label-WMH_probseg",
        ),
        "root",
    )
    found = {(s.session, s.run): (len(s.masks), s.t1 is not None) for s in listing.scans}
    assert found == {("a", "run-1"): (0, False), ("a", "run-2"): (1, True), ("b", ""): (1, True)}
    assert {s.subject for s in listing.scans} == {"sub-1"}
    assert listing.unmatched_masks == ()


def test_bids_mask_without_run_is_not_guessed_between_two_runs() -> None:
    listing = list_bids(
        paths(
            "sub-1/anat/sub-1_run-1_FLAIR",
            "sub-1/anat/sub-1_run-2_FLAIR",
            "derivatives/m/sub-1/anat/sub-1_label-WMH_mask",
        ),
        "root",
    )
    assert [scan.masks for scan in listing.scans] == [(), ()]
    assert len(listing.unmatched_masks) == 1


def test_bids_takes_lesion_masks_and_prefers_wmh() -> None:
    flair, folder = "sub-1/anat/sub-1_FLAIR", "derivatives/m/sub-1/anat/sub-1"
    lesion = list_bids(paths(flair, f"{folder}_desc-lesion_mask"), "root")
    assert [_bare(m) for m in only(lesion).masks] == [f"{folder}_desc-lesion_mask"]
    both = list_bids(paths(flair, f"{folder}_desc-lesion_mask", f"{folder}_label-WMH_mask"), "root")
    assert [_bare(m) for m in only(both).masks] == [f"{folder}_label-WMH_mask"]
    two = list_bids(
        paths(flair, f"{folder}_desc-a_label-WMH_mask", f"{folder}_desc-b_label-WMH_mask"), "root"
    )
    assert len(only(two).masks) == 2


def test_bids_asks_which_pipeline_has_the_reference() -> None:
    files = paths(
        "sub-1/anat/sub-1_FLAIR",
        "derivatives/manual/sub-1/anat/sub-1_label-WMH_mask",
        "derivatives/wmh-lora/sub-1/anat/sub-1_label-WMH_mask",
    )
    with pytest.raises(ConfigError, match=r"manual, wmh-lora.*--derivatives manual"):
        list_bids(files, "root")
    scan = only(list_bids(files, "root", derivatives="wmh-lora"))
    assert [_bare(m) for m in scan.masks] == [
        "derivatives/wmh-lora/sub-1/anat/sub-1_label-WMH_mask"
    ]


@pytest.mark.parametrize("place", ["sub-1", "sub-1/anat", "sub-1/ses-a", "sub-1/ses-a/anat"])
def test_bids_masks_outside_any_pipeline_are_those_of_derivatives(place: str) -> None:
    flair, mask = "sub-1/ses-a/anat/sub-1_ses-a_FLAIR", f"derivatives/{place}/sub-1_ses-a_label-WMH"
    files = paths(flair, f"{mask}_mask", "derivatives/tool/sub-1/sub-1_ses-a_label-WMH_mask")
    with pytest.raises(ConfigError, match=r"pipelines \(derivatives, tool\)"):
        list_bids(files, "root")
    scan = only(list_bids(files, "root", derivatives="derivatives"))
    assert [_bare(m) for m in scan.masks] == [f"{mask}_mask"]


@pytest.mark.parametrize(
    ("spaces", "taken"),
    [
        (("", "space-T1w_"), ""),
        (("space-orig_", "space-template_"), "space-orig_"),
        (("space-T1w_",), "space-T1w_"),
    ],
)
def test_bids_prefers_structures_on_the_grid_of_the_scan(
    spaces: tuple[str, ...], taken: str
) -> None:
    start = "derivatives/m/sub-1/anat/sub-1_"
    masks = (f"{start}{space}label-brain_mask" for space in spaces)
    files = paths("sub-1/anat/sub-1_FLAIR", f"{start}label-WMH_mask", *masks)
    found = only(list_bids(files, "root")).structures
    assert {name: _bare(path) for name, path in found.items()} == {
        "brain": f"{start}{taken}label-brain_mask"
    }


def test_bids_data_sets_beside_each_other_keep_their_subjects_apart() -> None:
    listing = list_bids(
        paths(
            "a/sub-1/anat/sub-1_FLAIR",
            "a/derivatives/m/sub-1/anat/sub-1_label-WMH_mask",
            "b/sub-1_FLAIR",
            "sub-1/anat/sub-1_FLAIR",
        ),
        "root",
        sites={("b", "sub-1"): "Delft"},
    )
    assert {(s.subject, s.site, len(s.masks)) for s in listing.scans} == {
        ("a-sub-1", "a", 1),
        ("b-sub-1", "Delft", 0),
        ("sub-1", "root", 0),
    }


@pytest.mark.parametrize(
    ("image", "mask", "subject"),
    [
        ("p1_FLAIR", "p1_mask", "p1"),
        ("p1_FLAIR", "p1_FLAIR_mask", "p1"),
        ("p1_T2_FLAIR", "p1_WMH", "p1"),
        ("p1-flair", "p1-lesion", "p1"),
        ("p1_brain_flair", "p1_seg", "p1"),
        ("p1", "p1_lesions", "p1"),
        ("p1", "p1_label", "p1"),
        ("my_person_1_FLAIR", "my_person_1_manual_mask", "my_person_1"),
        ("demo_FLAIR", "demo_space-orig_label-WMH_desc-reference_mask", "demo"),
        ("p1/FLAIR", "p1/mask", "p1"),
        ("p1/p1_FLAIR", "p1/p1_mask", "p1"),
        ("images/p1", "labels/p1", "p1"),
        ("images/p1_FLAIR", "masks/p1", "p1"),
        ("imagesTr/p1_0000", "labelsTr/p1", "p1"),
        ("imagesTs/p1_0000", "labelsTs/p1", "Ts-p1"),
        ("images_val/p1", "labels_val/p1", "val-p1"),
        ("images2/p1", "masks2/p1", "2-p1"),
        ("labelled/p1_FLAIR", "labelled/p1_mask", "labelled-p1"),
        ("masked/p1_FLAIR", "masked/p1_seg", "masked-p1"),
        ("lesion_study/p1/FLAIR", "lesion_study/p1/mask", "lesion_study-p1"),
    ],
)
def test_flat_pairs(image: str, mask: str, subject: str) -> None:
    listing = list_flat(paths(image, mask, "atlas/p1_label-brain_mask"), "root")
    assert pairs(listing) == {subject: (image, mask)}
    assert listing.unmatched_masks == ()


def test_flat_keeps_persons_apart_and_visits_together() -> None:
    listing = list_flat(
        paths(
            "a/p1_ses-1_FLAIR", "a/p1_ses-1_mask", "a/p1_ses-1_T1w", "a/p1_ses-2_FLAIR",
            "b/p1_FLAIR", "b/p2/visit3/FLAIR", "b/p1_T2w", "b/T1_mask",
        ),
        "root",
    )  # fmt: skip
    found = {(s.site, s.subject, s.session, len(s.masks), s.t1 is not None) for s in listing.scans}
    assert found == {
        ("a", "a-p1", "1", 1, True),
        ("a", "a-p1", "2", 0, False),
        ("b", "b-p1", "", 0, False),
        ("b", "b-p2", "3", 0, False),
    }


def test_flat_runs_are_of_one_person() -> None:
    listing = list_flat(
        paths(
            "sub-05_run-1_FLAIR", "sub-05_run-1_mask", "sub-05_run-2_FLAIR", "sub-05_run-2_mask",
            "sub-06/sub-06_acq-3D_FLAIR", "sub-06/sub-06_acq-3D_mask",
            "sub-07_ses-2_FLAIR", "sub-07_ses-2_mask",
        ),
        "root",
    )  # fmt: skip
    found = [(s.site, s.subject, s.session, s.run, len(s.masks)) for s in listing.scans]
    assert sorted(found) == [
        ("root", "sub-05", "", "run-1", 1),
        ("root", "sub-05", "", "run-2", 1),
        ("root", "sub-06", "", "acq-3D", 1),
        ("root", "sub-07", "2", "", 1),
    ]
    assert not listing.unmatched_masks


def test_flat_says_which_channel_is_the_flair() -> None:
    files = paths("imagesTr/p_0000", "imagesTr/p_0001", "labelsTr/p")
    scan = only(list_flat(files, "root", channels={"0000": "t1", "0001": "flair"}))
    assert (_bare(scan.image), scan.t1 and _bare(scan.t1)) == ("imagesTr/p_0001", "imagesTr/p_0000")


def test_flat_leaves_other_images_out_where_flairs_are_named() -> None:
    listing = list_flat(paths("p1_FLAIR", "p1_mask", "template", "p2_mask"), "root")
    assert pairs(listing) == {"p1": ("p1_FLAIR", "p1_mask")}
    assert [_bare(mask) for mask in listing.unmatched_masks] == ["p2_mask"]


def test_flat_shows_two_masks_of_one_image() -> None:
    assert len(only(list_flat(paths("p_FLAIR", "p_mask", "p_seg"), "root")).masks) == 2
