"""The study of networks: equal time, thresholds of the other scanner, a table that agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.architectures import (
    ARCHITECTURES,
    _Study,
    scores_of,
    steps_in_equal_time,
    study_text,
)
from benchmarks.harness import Timings
from benchmarks.training import training_step
from tests.site_scans import write_site
from wmh_lora.evaluation.sweep import THRESHOLDS
from wmh_lora.training.settings import read_run_config

_COMPUTER = {"cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.0"}


def _result(cohort_best: int, other_best: int, height: float) -> dict[str, object]:
    """Dice falls by 0.01 for every threshold away from the best."""
    levels = np.arange(len(THRESHOLDS))
    return {
        "parameters": 2_000_000,
        "steps": 400,
        "cohort": {
            "a": (height - 0.01 * abs(levels - cohort_best)).tolist(),
            "b": (height + 0.1 - 0.01 * abs(levels - cohort_best)).tolist(),
        },
        "synthetic": dict.fromkeys("st", (height + 0.2 - 0.01 * abs(levels - 9)).tolist()),
        "other": (0.7 - 0.01 * abs(levels - other_best)).tolist(),
        "healthy_ml": (20.0 - levels).tolist(),
    }


def test_slower_networks_get_fewer_steps() -> None:
    timings = Timings({"first": [1.0, 1.0, 2.0], "slow": [2.5, 2.5, 5.0], "fast": [0.5, 0.5, 1.0]})
    assert steps_in_equal_time(timings, 400) == {"first": 400, "slow": 160, "fast": 800}


def test_thresholds_come_from_the_other_scanner() -> None:
    cohort, other, healthy_ml = scores_of(_result(cohort_best=4, other_best=7, height=0.5))
    assert cohort == pytest.approx({"a": 0.47, "b": 0.57})
    assert other == pytest.approx(0.67)
    assert healthy_ml == 16.0


def test_table_holds_means_gains_and_bests() -> None:
    results = {"compact": _result(4, 7, 0.5), "another": _result(4, 4, 0.6)}
    text = study_text(results, command="run me", computer=_COMPUTER)
    assert "| compact | 2.0 | 400 | 0.520 |  | 0.550 | 0.670 | 0.700 | 16.0 | 0.700 |" in text
    assert "| another | 2.0 | 400 | 0.650 | +0.130 (+0.130 to +0.130) | 0.650 | 0.700 |" in text
    assert "| 0.800 | +0.100 (+0.100 to +0.100) |" in text


def test_results_and_runs_are_kept_while_nothing_changes_that_decides_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, healthy = tmp_path / "data", tmp_path / "healthy"
    sources = [root / "labelmaps" / "head.nii.gz", root / "lesion-masks-mni" / "sub-26_mask.nii.gz"]
    sources.append(sources[1].with_name("sub-01_mask.nii.gz"))
    for path in (*sources, healthy):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"first")
    *cohort, other, synthetic = write_site(tmp_path / "site", 4)
    work = tmp_path / "work"
    work.mkdir()
    study = _Study(cohort, other, [synthetic], healthy, root, tmp_path / "cache", work, 600)
    runs: list[Path] = []

    def result(self: _Study, name: str, steps: int, run: Path) -> dict[str, Any]:
        runs.append(run)
        return {}

    monkeypatch.setattr(_Study, "_result", result)
    drawn = synthetic.reference, cohort[0].reference
    for changing in (None, *drawn, other.image, healthy, sources[0]):
        if changing is not None:
            changing.write_bytes(b"changed")
        study._kept("compact", 600)
        study._kept("compact", 600)
    assert len(runs) == 6
    assert len(set(runs[:5])) == 1, "the network is tested anew, not trained anew"
    assert runs[5] != runs[4], "and trained anew where its sources have changed"
    sources[1].write_bytes(b"changed")  # the mask of the scan that is tested on, which is left out
    study._kept("compact", 600)
    assert len(runs) == 6


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_are_what_their_names_say_and_can_be_trained(name: str) -> None:
    config = read_run_config(
        ARCHITECTURES[name].config,
        [*ARCHITECTURES[name].overrides(300), "training.batch_size=1", "training.crop=64"],
    )
    assert config.model.decoder_skips == ("without skip" not in name)
    assert config.model.in_channels == (1 if "without neighbouring" in name else 3)
    pixels = [float(size) for size in ("1.25", "1.5") if f"pixels of {size} mm" in name]
    assert [config.preprocess.pixel_size_mm] == (pixels or [1.0])
    assert config.model.encoder == ("litemedsam" if "LiteMedSAM" in name else "compact")
    assert config.training.steps == 300
    assert (config.data["real"], config.data["real_lanes"]) == ([], 0)
    training_step(config)()
