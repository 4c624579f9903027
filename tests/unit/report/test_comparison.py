from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wmh_lora.evaluation.cohort import Case, Pair
from wmh_lora.evaluation.layouts import ScanFile
from wmh_lora.evaluation.metrics import ChallengeMetrics
from wmh_lora.evaluation.statistics import compare_paired, summarise
from wmh_lora.report.comparison import (
    OUTPUTS,
    MethodCosts,
    comparison_document,
    comparison_markdown,
    write_comparison,
)

METRICS = ChallengeMetrics(0.5, 4.0, 20.0, 0.8, 0.6, 0.5, 0.5, 0.5, 10.0, 12.0, 5, 6)
FOLDERS = {name: (Path(name), Path("reference")) for name in ("ours", "theirs", "older")}


def _cases(method: str, dice: Sequence[float], **changes: Any) -> list[Case]:
    return [
        Case(
            Pair(
                method,
                ScanFile(Path(method, f"{n}.nii.gz"), str(n)),
                ScanFile(Path("reference", f"{n}.nii.gz"), str(n)),
            ),
            replace(METRICS, dice=value, **changes),
        )
        for n, value in enumerate(dice)
    ]


OURS, THEIRS = [0.7, 0.8, 0.75, 0.6], [0.65, 0.7, 0.7, 0.62]
COSTS = {
    "ours": MethodCosts(1_234_567, 2, (99.0, 101.0), (2.0, 4.0)),
    "theirs": MethodCosts(8, 1, (100.0,), (1.0,)),
}


@pytest.fixture
def document() -> dict[str, Any]:
    cases = [
        *_cases("ours", OURS),
        *_cases("theirs", THEIRS, hd95_mm=math.nan, prediction_ml=7.0),
        *_cases("older", OURS[:2]),
    ]
    return comparison_document(FOLDERS, cases, COSTS, against="ours", budget_seconds=100.0)


def test_rows_agree_with_the_statistics_of_the_package(document: dict[str, Any]) -> None:
    ours, theirs, older = document["methods"]
    people = ["0", "1", "2", "3"]
    summary = summarise(OURS, people)
    assert ours["dice"] == pytest.approx(summary.mean)
    assert ours["dice_interval"] == pytest.approx(list(summary.mean_interval))
    assert (ours["training_seconds"], ours["inference_seconds"]) == (100.0, 3.0)
    assert ours["volume_bias_ml"] == pytest.approx(2.0)
    assert theirs["volume_bias_ml"] == pytest.approx(-3.0)
    assert (theirs["hd95_mm"], theirs["hd95_mm_undefined"]) == (None, 4)
    assert (older["scans"], older["parameters"], older["training_seconds"]) == (2, None, None)


def test_differences_are_method_minus_ours(document: dict[str, Any]) -> None:
    rows = {(row["method"], row["measure"]): row for row in document["differences"]}
    expected = compare_paired(OURS, THEIRS, ["0", "1", "2", "3"])
    row = rows["theirs", "dice"]
    assert row["mean_difference"] == pytest.approx(expected.mean_difference)
    assert row["mean_difference"] < 0
    assert row["p_value"] == pytest.approx(expected.p_value)
    assert row["p_holm"] >= row["p_value"]
    assert row["interval"] == pytest.approx(list(expected.interval))
    assert rows["older", "dice"]["scans"] == 2  # those that both have
    assert rows["older", "dice"]["mean_difference"] == 0
    assert rows["theirs", "hd95_mm"]["mean_difference"] is None
    assert not any(row["method"] == "ours" for row in document["differences"])


def test_the_text_says_what_a_reader_must_know(document: dict[str, Any]) -> None:
    text = comparison_markdown(document)
    assert "1,234,567 (2 networks)" in text
    assert "for 100 CPU s a fold" in text
    assert "(4 undefined)" in text
    assert "\N{MINUS SIGN}3.00" in text
    assert "different numbers of scans" in text
    assert "Small sample" in text
    assert "-0" not in text


def test_what_is_undefined_is_counted_in_every_cell(document: dict[str, Any]) -> None:
    text = comparison_markdown(document).partition("## Differences")[2]
    (row,) = [line for line in text.splitlines() if line.startswith("| theirs ")]
    assert row.count("(4 undefined)") == 1  # HD95
    assert "as few as 0 people" not in text


def test_methods_without_a_scan_in_common_have_no_difference() -> None:
    apart = _cases("theirs", THEIRS)
    moved = [
        replace(case, pair=replace(case.pair, reference=ScanFile(Path("x", f"{i}.nii"), f"x{i}")))
        for i, case in enumerate(apart)
    ]
    document = comparison_document(FOLDERS, [*_cases("ours", OURS), *moved], {}, against="ours")
    assert all(row["scans"] == 0 and row["p_value"] is None for row in document["differences"])
    assert "n/a" in comparison_markdown(document)


def test_one_method_is_no_comparison_but_a_table() -> None:
    document = comparison_document(FOLDERS, _cases("ours", OURS), {}, against="ours")
    assert document["differences"] == []
    assert "Differences" not in comparison_markdown(document)


def test_equal_input_gives_equal_files(document: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_comparison(document, tmp_path / name)
    for name in OUTPUTS:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "comparison.json").read_text()) == document
    head, *rows = (tmp_path / "a" / "comparison.tsv").read_text().splitlines()
    assert len(rows) == 3
    assert all(len(row.split("\t")) == len(head.split("\t")) for row in rows)
