"""What the benchmarks write, and that they measure what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import evaluation
from benchmarks.harness import publish
from wmh_lora.volume import Volume


def test_results_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"seconds": 1.5}
    rows = [("step", "seconds"), ("bare", "1.5")]
    publish(document, rows, tmp_path / "r.json", tmp_path / "r.md")
    assert json.loads(capsys.readouterr().out) == document
    assert json.loads((tmp_path / "r.json").read_text()) == document
    table = "| step | seconds |\n| --- | --- |\n| bare | 1.5 |\n"
    assert (tmp_path / "r.md").read_text() == table


def test_evaluation_is_timed_on_pairs_of_the_stated_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluation.SHAPE == (256, 256, 48)
    monkeypatch.setattr(evaluation, "SHAPE", (64, 64, 12))
    monkeypatch.setattr(evaluation, "DISTINCT", 2)
    evaluation.write_pairs(tmp_path, 3)
    masks = [Volume.read(p).data for p in sorted((tmp_path / "reference").iterdir())]
    assert [mask.shape for mask in masks] == [(64, 64, 12)] * 3
    assert (masks[0] == masks[2]).all()
    assert (masks[0] != masks[1]).any()

    result = evaluation.benchmark_evaluation(3, jobs=1, figures=False)
    assert result["limit_seconds"] == pytest.approx(1.8)
    assert result["cpu_seconds"] > 0
    assert result["within_limit"] == (result["seconds"] <= result["limit_seconds"])
