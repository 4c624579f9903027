"""Training curves and TensorBoard events."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from wmh_lora.errors import ConfigError
from wmh_lora.training.logbook import RunLogs, draw_curves


def _records() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, 7):
        losses = dict.fromkeys(("loss", "focal", "dice", "boundary", "heads"), 1 / step)
        rates = {"lr_lora": 1e-3, "lr_adapter": 1e-3, "lr_decoder": 2e-3}
        records.append({"step": step, "kind": "train", **losses, **rates})
    records[2]["loss"] = None  # it was not finite
    for step, score in ((3, 0.5), (6, None)):
        for case in ("a", "b"):
            records.append({"step": step, "kind": "validation", "case": case, "score": score})
        records.append({"step": step, "kind": "validation_mean", "score": score})
    return records


@pytest.mark.parametrize("count", [0, 1, 6, 12])
def test_curves_of_any_length(tmp_path: Path, count: int) -> None:
    path = tmp_path / "curves.png"
    draw_curves(_records()[:count], path)
    with Image.open(path) as picture:
        assert picture.size == (960, 900)


def test_curves_are_drawn_after_a_validation_and_at_the_end(tmp_path: Path) -> None:
    logs, path = RunLogs(tmp_path), tmp_path / "curves.png"
    drawn = []
    with (tmp_path / "metrics.jsonl").open("w") as stream:
        for record in _records()[:9]:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            logs(record)
            drawn.append(path.exists())
    assert drawn == [False] * 8 + [True]
    path.unlink()
    logs.close()
    assert path.exists()


def test_without_matplotlib_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    with caplog.at_level(logging.INFO, logger="wmh_lora"):
        logs = RunLogs(tmp_path)
        for record in _records():
            logs(record)
        logs.close()
    assert not (tmp_path / "curves.png").exists()
    assert [record.message for record in caplog.records if "matplotlib" in record.message] == [
        "no curves.png: matplotlib is not installed (pip install matplotlib)"
    ]


def test_tensorboard_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        RunLogs(tmp_path, tensorboard=True)


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logs = RunLogs(tmp_path, tensorboard=True)
    (tmp_path / "metrics.jsonl").write_text("")
    for record in _records():
        logs(record)
    logs.close()
    assert [path.stat().st_size > 500 for path in (tmp_path / "tensorboard").iterdir()] == [True]
