"""The report of a tuning: every setting in the table, nothing undefined in print, equal files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from wmh_lora.errors import DataError
from wmh_lora.evaluation.measures import measure
from wmh_lora.evaluation.selection import (
    Setting,
    choose,
    leave_one_out,
    mean_band,
    simplicity,
)
from wmh_lora.evaluation.sweep import SWEPT_MEASURES
from wmh_lora.report.tuning import (
    OUTPUTS,
    summary_lines,
    tuning_document,
    tuning_figure,
    tuning_markdown,
    tuning_table,
    write_tuning,
)
from wmh_lora.training.tune import Tuning

MODEL = {"name": "a|b", "weights_sha256": "0" * 64}


def _tuning(subjects: int, *, healthy: int = 0, key: str = "dice", known: bool = True) -> Tuning:
    settings = tuple(
        Setting(round(0.1 * n, 1), size, tta)
        for tta in ("none", "d4")
        for n in range(1, 10)
        for size in (1, 3)
    )
    rng = np.random.default_rng(4)
    curve = np.array([0.7 - (s.threshold - 0.4) ** 2 + 0.01 * (s.tta == "d4") for s in settings])
    noise = rng.normal(0.0, 0.1, (subjects, 1)) + rng.normal(0.0, 0.01, (subjects, len(settings)))
    scores = dict.fromkeys(SWEPT_MEASURES, curve + noise)
    ranks = simplicity(settings, Setting(0.5, 3, "none"))
    best, chosen = choose(scores[key], ranks)
    low, high = mean_band(scores[key])
    return Tuning(
        metric=measure(key),
        settings=settings,
        subjects=tuple(f"sub-{n:02}" for n in range(subjects)),
        scores=scores,
        low=low,
        high=high,
        scans=subjects,
        healthy_scans=healthy,
        false_positive_ml=np.full(len(settings), 0.25 if healthy else np.nan),
        best=best,
        chosen=chosen,
        present=settings.index(Setting(0.5, 3, "none")) if known else None,
        scope="every scan" if known else "three planes",
        left_out=tuple(leave_one_out(scores[key], ranks)),
    )


def test_the_table_holds_every_setting_and_marks_the_choice() -> None:
    tuning = _tuning(12, healthy=2)
    rows = list(csv.DictReader(io.StringIO(tuning_table(tuning)), delimiter="\t"))
    assert len(rows) == len(tuning.settings)
    [chosen] = [row for row in rows if row["mark"] == "chosen"]
    assert float(chosen["threshold"]) == tuning.setting.threshold
    assert float(chosen["low"]) < float(chosen["mean"]) < float(chosen["high"])
    assert {"lesion_f1", "avd_percent", "false_positive_ml"} <= chosen.keys()


def test_the_document_compares_with_before() -> None:
    tuning = _tuning(12)
    document = tuning_document(tuning, MODEL)
    assert document["before"]["threshold"] == 0.5
    assert document["chosen"]["false_positive_ml"] is None
    assert document["left_out"]["low"] < document["left_out"]["mean"]
    gain = document["left_out"]["mean"] - document["before"]["mean"]
    assert document["left_out"]["gain"]["mean"] == pytest.approx(gain, abs=1e-5)
    assert len(document["per_subject"]) == 12
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize("subjects", [1, 2, 12])
@pytest.mark.parametrize("known", [True, False])
def test_nothing_undefined_is_printed(subjects: int, known: bool) -> None:
    tuning = _tuning(subjects, known=known, healthy=subjects % 2)
    document = tuning_document(tuning, MODEL)
    texts = [tuning_markdown(document, tuning), tuning_table(tuning), *summary_lines(tuning)]
    for text in texts:
        assert "nan" not in text.replace("n/a", "").lower()
        assert "None" not in text
    report = texts[0]
    assert r"a\|b" in report
    assert ("a hint" in report) == (subjects < 10)
    assert ("Leave-one-out" in report) == (subjects > 1)


def test_the_curve_is_that_of_the_chosen_size_and_views() -> None:
    tuning = _tuning(12)
    [axis] = tuning_figure(tuning).axes
    line = next(line for line in axis.lines if line.get_label() == "mean")
    x, y = (np.asarray(values, dtype=np.float64) for values in line.get_data())
    np.testing.assert_allclose(x, np.arange(1, 10) / 10)
    here = [
        n
        for n, s in enumerate(tuning.settings)
        if (s.min_voxels, s.tta) == (tuning.setting.min_voxels, tuning.setting.tta)
    ]
    np.testing.assert_allclose(y, tuning.mean[here])


def test_equal_tunings_give_equal_files(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write_tuning(_tuning(3), MODEL, folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(OUTPUTS)
        contents.append([(folder / output).read_bytes() for output in OUTPUTS])
    assert contents[0] == contents[1]
    with pytest.raises(DataError, match="--overwrite"):
        write_tuning(_tuning(3), MODEL, tmp_path / "a")
    write_tuning(_tuning(2), MODEL, tmp_path / "a", overwrite=True)
