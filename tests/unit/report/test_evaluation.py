"""The document and the report of an evaluation, from cases that are made up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wmh_lora.evaluation.cohort import Case, Pair, Unpaired
from wmh_lora.evaluation.layouts import ScanFile
from wmh_lora.evaluation.measures import MEASURES
from wmh_lora.evaluation.metrics import ChallengeMetrics
from wmh_lora.report.evaluation import (
    Evaluation,
    Failure,
    case_dictionary,
    case_rows,
    case_table,
    evaluation_document,
)
from wmh_lora.report.evaluation_text import evaluation_markdown

FOLDER = Path("/data/somebody")


def case(subject: str, dice: float, volume_ml: float, **changes: Any) -> Case:
    series, site = changes.get("series", "A"), changes.get("site", "")
    pair = Pair(
        series,
        ScanFile(FOLDER / series / f"{subject}.nii", subject),
        ScanFile(FOLDER / "ref" / f"{subject}.nii", subject, changes.get("session", "")),
        site,
    )
    metrics = ChallengeMetrics(
        dice=dice,
        hd95_mm=changes.get("hd95_mm", 3.0),
        avd_percent=10.0,
        lesion_recall=0.8,
        lesion_f1=0.7,
        lesion_precision=0.6,
        precision=0.8,
        recall=0.8,
        reference_ml=volume_ml,
        prediction_ml=volume_ml * 1.1,
        reference_lesions=5,
        prediction_lesions=7,
    )
    return Case(pair, metrics, changes.get("grid_note", ""), changes.get("note", ""))


def evaluation(*cases: Case, **changes: Any) -> Evaluation:
    series = dict.fromkeys(c.pair.series for c in cases)
    folders = {name: (FOLDER / name, FOLDER / "ref") for name in series}
    return Evaluation(**{"kind": "single", "folders": folders, "cases": cases, **changes})


COHORT = evaluation(
    case("1", 0.8, 1.0, site="Oslo"),
    case("2", 0.6, 5.0, site="Bergen"),
    case("3", 0.7, 10.0, site="Oslo"),
    case("4", math.nan, 30.0, site="", hd95_mm=math.nan),
)


def summary(document: dict[str, Any], **wanted: str) -> dict[str, Any]:
    (row,) = [r for r in document["summary"] if all(r[k] == v for k, v in wanted.items())]
    return dict(row)


def test_groups_by_site_and_lesion_load() -> None:
    document = evaluation_document(COHORT, resamples=200)
    overall = summary(document, group="overall", measure="dice")
    assert (overall["scans"], overall["undefined"]) == (3, 1)
    assert overall["mean"] == pytest.approx(0.7)
    assert summary(document, level="Oslo", measure="dice")["mean"] == pytest.approx(0.75)
    levels = [row["level"] for row in document["summary"] if row["measure"] == "dice"]
    assert levels == ["all", "Bergen", "Oslo", "n/a", "< 2 mL", "2-10 mL", "> 10 mL"]
    assert summary(document, level="2-10 mL", measure="dice")["scans"] == 2


def test_document_is_strict_json_without_places_on_disk() -> None:
    failed = replace(case("9", 0.0, 1.0).pair)
    full = replace(
        COHORT,
        failures=[Failure("A", f"{failed.prediction.path} is cut short.", failed)],
        unpaired=[Unpaired("A", "reference", FOLDER / "ref" / "8.nii", "no counterpart")],
    )
    text = json.dumps(evaluation_document(full, resamples=200), allow_nan=False)
    assert str(FOLDER) not in text
    assert "9.nii is cut short" in text
    assert json.loads(text)["unpaired"][0]["file"] == "8.nii"


def test_table_and_dictionary_have_the_same_columns() -> None:
    lines = case_table(case_rows(COHORT)).splitlines()
    assert lines[0].split("\t") == list(case_dictionary())
    assert len(lines) == 5
    undefined = dict(zip(lines[0].split("\t"), lines[1].split("\t"), strict=True))
    assert undefined["site"] == "n/a"
    assert undefined["dice"] == "n/a"
    assert {entry.key for entry in MEASURES} <= set(case_dictionary())


def test_message_cannot_break_the_table() -> None:
    text = case_table(case_rows(evaluation(case("1", 0.5, 1.0, note="two\nlines\tand a tab"))))
    assert "two lines and a tab" in text.splitlines()[1]


def test_report_of_one_cohort() -> None:
    text = evaluation_markdown(evaluation_document(COHORT, resamples=200), {"f.png": "A figure."})
    assert "| Dice " in text
    assert "(1 undefined)" in text
    assert "Only 4 scans" in text
    assert "![Figure 1](f.png)" in text
    assert "Bland and Altman (1999)" in text
    # every table has one number of cells in all of its lines
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) <= 1


def test_report_says_that_visits_are_not_independent() -> None:
    visits = evaluation(*(case("1", 0.5, 2.0 + n, session=str(n)) for n in range(3)))
    text = evaluation_markdown(evaluation_document(visits, resamples=200))
    assert "3 scans come from 1 subjects" in text


def test_names_cannot_break_the_report() -> None:
    document = evaluation_document(evaluation(case("1", 0.5, 2.0, series="a|b")), resamples=200)
    assert "a\\|b" in evaluation_markdown(document)


def test_grids_are_reported() -> None:
    noted = evaluation(case("1", 0.5, 2.0, grid_note="affines differ by up to 2"))
    assert "affines differ by up to 2" in evaluation_markdown(
        evaluation_document(noted, resamples=200)
    )


def test_methods_without_a_scan_in_common_are_not_said_to_agree() -> None:
    cases = case("1", 0.5, 2.0, series="A"), case("2", 0.5, 2.0, series="B")
    apart = evaluation(*cases, kind="methods")
    text = evaluation_markdown(evaluation_document(apart, resamples=200))
    assert "No scan was scored for both" in text
    assert "The two agree" not in text


def test_comparison_is_paired_by_reference() -> None:
    rng = np.random.default_rng(1)
    values = rng.uniform(0.4, 0.8, (12, 2))
    cases = [
        case(str(n), float(values[n, side]), 5.0, series=name)
        for n in range(12)
        for side, name in enumerate("AB")
        if (n, name) != (11, "B")
    ]
    document = evaluation_document(evaluation(*cases, kind="methods"), resamples=200)
    comparison = document["comparison"]
    assert (comparison["scans"], comparison["only_first"], comparison["only_second"]) == (11, 1, 0)
    row = comparison["rows"][0]
    assert row["mean_difference"] == pytest.approx((values[:11, 1] - values[:11, 0]).mean())
    assert row["p_holm"] == pytest.approx(min(1.0, 5 * row["p_value"]))
    text = evaluation_markdown(document)
    assert "## B against A" in text
    assert "1 scans were scored for one of the two only" in text


def test_domain_shift_is_measured_from_the_first_cohort() -> None:
    cases = [
        case(str(n), 0.8 - 0.1 * i, 5.0, series=s) for n in range(3) for i, s in enumerate("ABC")
    ]
    document = evaluation_document(evaluation(*cases, kind="cohorts"), resamples=200)
    dice = [row for row in document["domain_shift"] if row["measure"] == "dice"]
    assert [(row["series"], row["minus"]) for row in dice] == [("B", "A"), ("C", "A")]
    assert [row["difference"] for row in dice] == pytest.approx([-0.1, -0.2])
    assert "\N{MINUS SIGN}0.200" in evaluation_markdown(document)
