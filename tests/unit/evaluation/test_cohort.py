"""Pairing of files, and scoring of pairs: nothing is dropped, and grids are judged as agreed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmh_lora.errors import ConfigError, DataError, GridMismatchError, UnreadableImageError
from wmh_lora.evaluation.cohort import (
    Pair,
    evaluate_pair,
    evaluate_pairs,
    match_scans,
    pair_folders,
    pair_with,
    read_participants,
)
from wmh_lora.evaluation.layouts import ScanFile
from wmh_lora.evaluation.metrics import evaluate
from wmh_lora.volume import Volume, write_nifti

SHAPE = (20, 18, 4)


def write_mask(path: Path, *voxels: tuple[int, int, int], **changes: Any) -> Path:
    data = np.zeros(changes.get("shape", SHAPE), np.float32)
    for voxel in voxels:
        data[voxel] = changes.get("value", 1.0)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = changes.get("origin_mm", (0.0, 0.0, 0.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, data, Volume(data, affine))
    return path


def pair_of(prediction: Path, reference: Path) -> Pair:
    return Pair("cohort", ScanFile(prediction, "1"), ScanFile(reference, "1"))


def scan(subject: str, session: str = "", run: str = "", site: str = "", n: int = 0) -> ScanFile:
    return ScanFile(Path(f"{subject}{session}{run}{site}{n}"), subject, session, run, site)


def test_several_labels_of_a_prediction_are_noted(tmp_path: Path) -> None:
    volume = Volume(np.zeros((16, 16, 16), np.float32), np.eye(4))
    reference, prediction = np.zeros((2, 16, 16, 16), np.float32)
    reference[2:4, 2:4, 2:4] = 1
    prediction[2:4, 2:4, 2:4], prediction[0, 0] = 255, 3
    for name, data in (("r", reference), ("p", prediction)):
        write_nifti(tmp_path / f"{name}.nii.gz", data, volume)
    case = evaluate_pair(pair_of(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz"))
    assert "several labels (3, 255)" in case.note


def test_a_background_of_nan_is_no_fraction(tmp_path: Path) -> None:
    volume = Volume(np.zeros((16, 16, 16), np.float32), np.eye(4))
    mask = np.zeros((16, 16, 16), np.float32)
    mask[2:4, 2:4, 2:4] = 1
    holed = np.where(np.indices(mask.shape)[0] > 10, np.nan, mask).astype(np.float32)
    for name, data in (("r", mask), ("p", holed)):
        write_nifti(tmp_path / f"{name}.nii.gz", data, volume)
    case = evaluate_pair(pair_of(tmp_path / "p.nii.gz", tmp_path / "r.nii.gz"))
    assert case.metrics.dice == 1.0
    assert "fractions" not in case.note


class TestMatching:
    def test_by_subject_session_and_scan(self) -> None:
        first = [scan("1", "a"), scan("1", "b"), scan("2")]
        second = [scan("1", "b"), scan("2"), scan("1", "a")]
        matches, left, right = match_scans(first, second)
        assert [(a.name, b.name) for a, b in matches] == [("1_a",) * 2, ("1_b",) * 2, ("2",) * 2]
        assert left == right == []

    def test_what_one_side_does_not_tell_may_be_anything(self) -> None:
        prediction = scan("1", run="run-1", site="GE3T")
        reference = scan("1", session="2", site="Amsterdam/GE3T")
        matches, _, _ = match_scans([prediction], [reference])
        assert matches == [(prediction, reference)]

    def test_other_visits_and_sites_do_not_match(self) -> None:
        matches, left, right = match_scans(
            [scan("1", "a"), scan("2", site="X")], [scan("1", "b"), scan("2", site="Y")]
        )
        assert matches == []
        assert [reason for _, reason in left + right] == ["no counterpart"] * 4

    def test_an_exact_match_wins(self) -> None:
        vague, exact, reference = scan("1"), scan("1", "a"), scan("1", "a", n=1)
        matches, left, _ = match_scans([vague, exact], [reference])
        assert matches == [(exact, reference)]
        assert [file for file, _ in left] == [vague]

    def test_several_files_for_one_scan_are_refused_and_named(self) -> None:
        first, second, reference = scan("1", n=1), scan("1", n=2), scan("1", n=3)
        matches, left, right = match_scans([first, second], [reference])
        assert matches == []
        assert "several files for one scan, such as 12" in left[0][1]
        assert right == [(reference, "several possible counterparts")]

    @given(
        st.lists(st.tuples(*(st.sampled_from(["", "a", "b"]) for _ in range(3))), max_size=8),
        st.lists(st.tuples(*(st.sampled_from(["", "a", "b"]) for _ in range(3))), max_size=8),
    )
    def test_every_file_is_in_one_place(self, lefts: list[Any], rights: list[Any]) -> None:
        first = [ScanFile(Path(f"l{i}"), "s" + a, b, c) for i, (a, b, c) in enumerate(lefts)]
        second = [ScanFile(Path(f"r{i}"), "s" + a, b, c) for i, (a, b, c) in enumerate(rights)]
        matches, left, right = match_scans(first, second)
        assert sorted(f.path for f in first) == sorted(
            [a.path for a, _ in matches] + [f.path for f, _ in left]
        )
        assert sorted(f.path for f in second) == sorted(
            [b.path for _, b in matches] + [f.path for f, _ in right]
        )


class TestFolders:
    def test_sites_come_from_the_table_before_the_layout(self, tmp_path: Path) -> None:
        for subject in ("0", "2"):
            write_mask(tmp_path / "pred" / "Utrecht" / subject / "result.nii.gz")
            write_mask(tmp_path / "ref" / "Utrecht" / subject / "wmh.nii.gz")
        pairing = pair_folders("c", tmp_path / "pred", tmp_path / "ref", sites={"2": "Delft"})
        assert [(p.name, p.site) for p in pairing.pairs] == [
            ("Utrecht/0", "Utrecht"),
            ("Utrecht/2", "Delft"),
        ]
        assert [p.subject_key for p in pairing.pairs] == ["Utrecht/0", "Utrecht/2"]

    def test_sites_are_found_whether_or_not_folders_are_called_sub(self, tmp_path: Path) -> None:
        for folder in ("pred", "ref"):
            write_mask(tmp_path / folder / "sub-01" / "mask.nii.gz")
        pairing = pair_folders("c", tmp_path / "pred", tmp_path / "ref", sites={"01": "Oslo"})
        assert [p.site for p in pairing.pairs] == ["Oslo"]

    def test_predictions_of_bids_scans_against_flat_references(self, tmp_path: Path) -> None:
        write_mask(tmp_path / "p" / "sub-01_space-orig_label-WMH_mask.nii.gz")
        write_mask(tmp_path / "r" / "01_wmh.nii.gz")
        (pair,) = pair_folders("c", tmp_path / "p", tmp_path / "r").pairs
        assert pair.name == "01"

    def test_no_pair_at_all(self, tmp_path: Path) -> None:
        write_mask(tmp_path / "p" / "a_mask.nii.gz")
        write_mask(tmp_path / "r" / "b_mask.nii.gz")
        with pytest.raises(DataError, match="'a' and 'b'"):
            pair_folders("c", tmp_path / "p", tmp_path / "r")

    def test_no_pair_for_another_reason_than_names(self, tmp_path: Path) -> None:
        for rater in ("a", "b"):
            write_mask(tmp_path / "p" / f"sub-1_desc-{rater}_mask.nii.gz")
        write_mask(tmp_path / "r" / "sub-1_mask.nii.gz")
        with pytest.raises(DataError, match=r"sub-1_desc-a_mask.*several files for one scan"):
            pair_folders("c", tmp_path / "p", tmp_path / "r")

    def test_with_references_that_are_known(self, tmp_path: Path) -> None:
        write_mask(tmp_path / "sub-1_mask.nii.gz")
        pairing = pair_with("c", tmp_path, [scan("1"), scan("2")], "of a list")
        assert [pair.reference for pair in pairing.pairs] == [scan("1")]
        assert [(u.role, u.path.name) for u in pairing.unpaired] == [("reference", "20")]
        with pytest.raises(DataError, match="reference of a list: the first names are '1' and '3'"):
            pair_with("c", tmp_path, [scan("3")], "of a list")


class TestScoring:
    def test_on_the_geometry_of_the_reference(self, tmp_path: Path) -> None:
        reference = write_mask(tmp_path / "r.nii.gz", (5, 5, 1), (5, 6, 1), (9, 9, 3))
        prediction = write_mask(tmp_path / "p.nii.gz", (5, 6, 1), (5, 8, 2))
        case = evaluate_pair(pair_of(prediction, reference))
        arrays = [Volume.read(path, allow_constant=True).data for path in (reference, prediction)]
        assert case.metrics == evaluate(arrays[0], arrays[1], (1.0, 1.0, 3.0))
        assert case.grid_note == case.note == ""

    @pytest.mark.parametrize(("shift_mm", "noted"), [(0.0009, False), (0.002, True)])
    def test_affines_that_differ_are_noted(
        self, tmp_path: Path, shift_mm: float, noted: bool
    ) -> None:
        reference = write_mask(tmp_path / "r.nii.gz", (5, 5, 1))
        prediction = write_mask(tmp_path / "p.nii.gz", (5, 5, 1), origin_mm=(0.0, shift_mm, 0.0))
        case = evaluate_pair(pair_of(prediction, reference))
        assert bool(case.grid_note) is noted
        assert case.metrics.dice == 1.0

    def test_shapes_that_differ(self, tmp_path: Path) -> None:
        reference = write_mask(tmp_path / "r.nii.gz")
        prediction = write_mask(tmp_path / "p.nii.gz", shape=(20, 18, 5))
        with pytest.raises(GridMismatchError, match=r"\(20, 18, 5\).*\(20, 18, 4\)"):
            evaluate_pair(pair_of(prediction, reference))

    @pytest.mark.parametrize("value", [3.0, 255.0, 0.5, -1.0])
    def test_unknown_labels_in_the_reference(self, tmp_path: Path, value: float) -> None:
        reference = write_mask(tmp_path / "r.nii.gz", (5, 5, 1), value=value)
        prediction = write_mask(tmp_path / "p.nii.gz")
        with pytest.raises(DataError, match=f"values {value:g};"):
            evaluate_pair(pair_of(prediction, reference))

    def test_not_a_number_in_the_reference(self, tmp_path: Path) -> None:
        reference = write_mask(tmp_path / "r.nii.gz", (5, 5, 1), value=np.nan)
        with pytest.raises(DataError, match="values nan"):
            evaluate_pair(pair_of(write_mask(tmp_path / "p.nii.gz"), reference))

    def test_a_probability_map_is_cut_and_noted(self, tmp_path: Path) -> None:
        reference = write_mask(tmp_path / "r.nii.gz", (5, 5, 1), value=1.0005)
        prediction = write_mask(tmp_path / "p.nii.gz", (5, 5, 1), value=0.7)
        case = evaluate_pair(pair_of(prediction, reference))
        assert case.metrics.dice == 1.0
        assert "0.5" in case.note

    def test_processes_give_the_same_and_keep_errors_apart(self, tmp_path: Path) -> None:
        reference = write_mask(tmp_path / "r.nii.gz", (5, 5, 1))
        pairs = [pair_of(reference, reference), pair_of(tmp_path / "gone.nii.gz", reference)]
        outcomes = [outcome for _, outcome in evaluate_pairs(pairs, jobs=2)]
        assert outcomes[0]() == evaluate_pair(pairs[0])
        with pytest.raises(UnreadableImageError, match="gone"):
            outcomes[1]()


class TestParticipants:
    def test_reads_sites(self, tmp_path: Path) -> None:
        path = tmp_path / "participants.tsv"
        path.write_text("participant_id\tage\tcentre\nsub-01\t60\tOslo\n02\t70\tn/a\n")
        assert read_participants(path, "centre") == {"01": "Oslo"}

    @pytest.mark.parametrize("text", ["participant_id\tage\nsub-01\t60\n", "", "a,site\n1,2\n"])
    def test_a_missing_column_is_named(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "participants.tsv"
        path.write_text(text)
        with pytest.raises(ConfigError, match="has no column"):
            read_participants(path)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "participants.tsv"
        path.write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ConfigError, match="Cannot read"):
            read_participants(path)
