"""The study of few-shot adaptation: nobody is tested on what taught them, and work is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapt
from benchmarks.adapt import Study, study_text
from tests.site_scans import write_site
from wmh_lora.files import file_sha256

_COMPUTER = {"cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.0"}


def _record(direction: int, contestant: str, dice: dict[str, float], **more: Any) -> dict[str, Any]:
    scans = [
        {"scan": scan, "dice": value, "lesion_f1": 0.5, "ventricles_dice": None}
        for scan, value in dice.items()
    ]
    return {"direction": direction, "contestant": contestant, "scans": scans, **more}


def _found(base: float, adapted: float) -> dict[str, Any]:
    return {"base_dice": base, "adapted_dice": adapted, "folds": [{"steps": 7}, {"steps": 7}]}


RECORDS = [
    _record(1, "base", {"b": 0.4, "d": 0.5}),
    _record(1, "tuned", {"b": 0.5, "d": 0.5}),
    _record(
        1, "lora", {"b": 0.6, "d": 0.8}, minutes=12.34, bytes=1_100_000,
        cross_validation=_found(0.41, 0.62),
    ),
    _record(2, "base", {"a": 0.6, "c": 0.7}),
    _record(2, "tuned", {"a": 0.6, "c": 0.7}),
    _record(
        2, "lora", {"a": 0.7, "c": 0.6}, minutes=14.0, bytes=1_100_000,
        cross_validation=_found(0.51, 0.72),
    ),
]  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Study:
    model = tmp_path / "model"
    model.write_bytes(b"model")
    cases = write_site(tmp_path / "site", 4)
    return Study(cases, model, None, 15.0, 42, tmp_path / "work")


def test_the_two_halves_hold_every_scan_once_each(study: Study) -> None:
    for train, test in study.halves():
        assert len(train) == len(test) == 2
        assert not {case.name for case in train} & {case.name for case in test}
    tested = [case.name for _, test in study.halves() for case in test]
    assert sorted(tested) == ["p0", "p1", "p2", "p3"]


def test_what_is_finished_is_kept_while_nothing_changes(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def base(self: Study, *_: Any) -> list[dict[str, Any]]:
        calls.append("base")
        return [_record(0, "base", {"a": 0.1})]

    def adapted(self: Study, train: Any, test: Any, method: str, name: str) -> list[dict[str, Any]]:
        calls.append(name)
        if name == "2-full" and calls.count(name) == 1:
            raise KeyboardInterrupt
        return [_record(0, method, {"a": 0.2})]

    monkeypatch.setattr(Study, "_base", base)
    monkeypatch.setattr(Study, "_adapted", adapted)
    with pytest.raises(KeyboardInterrupt):
        study.results()
    assert calls == ["base", "1-lora", "1-full", "base", "2-lora", "2-full"]
    records = study.results()
    assert calls[6:] == ["2-full"]
    assert [(r["direction"], r["contestant"]) for r in records] == [
        (number, name) for number in (1, 2) for name in ("base", "lora", "full")
    ]
    study.model.write_bytes(b"another model")
    study.results()
    assert len(calls) == 7 + 6


def test_what_decides_a_result_is_in_its_identity(study: Study, tmp_path: Path) -> None:
    before = study.identity
    assert before == study.identity == json.loads(json.dumps(before))
    reference = study.cases[1].reference
    assert reference is not None
    reference.write_bytes(b"drawn anew")
    redrawn = study.identity
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    based = dataclasses.replace(study, base_weights=weights).identity
    named = reference.rename(reference.with_name("p1_label-WMH_mask.nii.gz"))
    cases = [dataclasses.replace(study.cases[1], reference=named)]
    alone = dataclasses.replace(study, cases=cases)
    without = alone.identity
    named.with_name("p1_label-ventricles_mask.nii.gz").write_bytes(b"ventricles")
    assert before != redrawn != based
    assert without != alone.identity


def test_means_and_gains_are_those_of_the_records() -> None:
    text = study_text(RECORDS, command="run me", model="base-1", computer=_COMPUTER, seen=0)
    assert "| base, its own settings | 0.450 | 0.650 | 0.550 | 0.500 |" in text
    row = "| adapter (`wmh-lora adapt`) | 0.700 | 0.650 | 0.675 | 0.500 |  | 14.0 | 1.1 |"
    assert row in text
    # 0.2, 0.3, 0.1 and -0.1
    assert "- against base, its own settings: +0.125" in text
    assert "better on 3 of 4 scans" in text
    assert "| 1 | lora | 0.410 | 0.620 | 7, 7 |" in text
    assert "| b | 0.400 | 0.500 | 0.600 |" in text
    assert "trained on none of these scans" in text
    assert "all weights" not in text


@pytest.mark.parametrize(
    ("seen", "words"), [(None, "was not checked"), (3, "trained on 3 of these 4 scans")]
)
def test_it_says_what_the_base_has_seen(seen: int | None, words: str) -> None:
    text = study_text(RECORDS, command="", model="m", computer=_COMPUTER, seen=seen)
    assert words in text


def test_scans_that_trained_the_base_are_counted(study: Study, tmp_path: Path) -> None:
    seen = {"x": file_sha256(study.cases[1].image), "y": "0" * 64}
    (tmp_path / "data.json").write_text(json.dumps({"training": seen, "validation": {}}))
    assert adapt._scans_seen(study.cases, tmp_path / "data.json") == 1
