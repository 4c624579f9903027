"""Few-shot adaptation against the base model and against full fine-tuning.

    python -m benchmarks.adapt [--data FOLDER] [--model NAME|FILE] [--minutes 15]

Adapts on every other scan of a labelled cohort and tests on the rest, then the other way round,
with `wmh-lora adapt` (LoRA and decoder) and with all weights trained, in the same time. What is
finished is kept in ``--work``: after an interruption, the same command goes on. At the end the
study is written to ``docs/studies/adapt.md``; what stands there under "Reading" is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import kept_result, machine, markdown_table, scan_identity, write_study
from wmh_lora import __version__
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.evaluation.metrics import dice, evaluate
from wmh_lora.evaluation.selection import mean_interval
from wmh_lora.files import file_sha256
from wmh_lora.models.registry import Model, model_path
from wmh_lora.training.adapt_network import METHODS, Base, Method
from wmh_lora.training.adapt_score import DiceTable, SettingGrid
from wmh_lora.training.tune import read_reference
from wmh_lora.training.tune_cases import TuningCase, cases_of_folders
from wmh_lora.volume import Volume

__all__ = ["Study", "study_text"]

_NAMES = {
    "base": "base, its own settings",
    "tuned": "base, threshold chosen on the 5",
    "lora": "adapter (`wmh-lora adapt`)",
    "full": "all weights trained",
}
_VENTRICLES = "label-ventricles"


@dataclass(frozen=True)
class Study:
    """What is compared, and where results are kept.

    Attributes
    ----------
    cases : sequence of TuningCase
        The cohort.
    model : Path
        Model file.
    base_weights : Path or None
        Of its base encoder.
    minutes : float
        Of each adaptation.
    seed : int
        Of each adaptation.
    work : Path
        Folder of results and adapters.
    """

    cases: Sequence[TuningCase]
    model: Path
    base_weights: Path | None
    minutes: float
    seed: int
    work: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What a kept result must agree with."""
        return {
            "model_sha256": file_sha256(self.model),
            "base_sha256": "" if self.base_weights is None else file_sha256(self.base_weights),
            "scans": scan_identity(self.cases),
            "ventricles": [file_sha256(path) for path in map(_ventricles, self.cases) if path],
            "minutes": self.minutes,
            "seed": self.seed,
            "package_version": __version__,
        }

    def halves(self) -> list[tuple[Sequence[TuningCase], Sequence[TuningCase]]]:
        """Scans to adapt on and scans to test on, both ways round."""
        first, second = self.cases[::2], self.cases[1::2]
        return [(first, second), (second, first)]

    def results(self) -> list[dict[str, Any]]:
        """Compute what is missing; one record for each direction and contestant."""
        self.work.mkdir(parents=True, exist_ok=True)
        records = []
        for number, (train, test) in enumerate(self.halves(), start=1):
            records += self._kept(f"{number}-base", partial(self._base, train, test))
            for method in METHODS:
                name = f"{number}-{method}"
                records += self._kept(name, partial(self._adapted, train, test, method, name))
        return records

    def _kept(self, name: str, compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        def directed() -> list[dict[str, Any]]:
            return [{**record, "direction": int(name[0])} for record in compute()]

        records: list[dict[str, Any]] = kept_result(
            self.work / f"{name}.json", self.identity, directed
        )
        return records

    def _base(
        self, train: Sequence[TuningCase], test: Sequence[TuningCase]
    ) -> list[dict[str, Any]]:
        """Score the base model with its own settings, and with those chosen on the other half."""
        model = Base(self.model, self.base_weights, "lora").model()
        engine = WMHInferenceEngine(model)
        grid = None
        rows = []
        for case in train:
            volume = Volume.read(case.image)
            maps = engine.predict_maps(engine.prepare(volume), engine.settings())
            threshold = model.card.inference.threshold_of(maps.looks.planes)
            grid = grid or SettingGrid(model.card.inference.changed(threshold=threshold))
            rows.append(grid.dice(maps.probability, read_reference(case, volume)))
        assert grid is not None
        chosen = grid.settings[DiceTable(grid, np.stack(rows)).chosen(range(len(rows)))]
        changed = {"threshold": chosen.threshold, "min_voxels": chosen.min_voxels}
        return [
            {"contestant": "base", "scans": _score(model, test)},
            {"contestant": "tuned", "scans": _score(model, test, **changed)},
        ]

    def _adapted(
        self, train: Sequence[TuningCase], test: Sequence[TuningCase], method: Method, name: str
    ) -> list[dict[str, Any]]:
        """Run the command in a process of its own, as a user does, and score what it wrote."""
        target = self.work / f"{name}.safetensors"
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            options = ["--method", method, "--minutes", str(self.minutes), "--seed", str(self.seed)]
            _run_adapt(train, Path(folder), self.model, self.base_weights, target, options)
        minutes = (time.monotonic() - started) / 60
        loaded = Base(self.model, self.base_weights, method).load(target)
        if loaded.adapter is not None:
            found = loaded.adapter.card.cross_validation
        else:
            found = loaded.card.metrics
        return [
            {
                "contestant": method,
                "scans": _score(loaded, test),
                "minutes": round(minutes, 2),
                "bytes": target.stat().st_size,
                "cross_validation": found,
            }
        ]


def _run_adapt(
    cases: Sequence[TuningCase],
    folder: Path,
    model: Path,
    base_weights: Path | None,
    target: Path,
    options: Sequence[str],
) -> None:
    """Adapt on copies of some scans; the result is written even if it does not help."""
    images, labels = folder / "images", folder / "labels"
    images.mkdir()
    labels.mkdir()
    for case in cases:
        assert case.reference is not None
        shutil.copyfile(case.image, images / case.image.name)
        shutil.copyfile(case.reference, labels / case.reference.name)
    command = [sys.executable, "-m", "wmh_lora", "-v", "adapt", "--force", "--overwrite"]
    command += ["--images", str(images), "--labels", str(labels)]
    command += ["--model", str(model), "-o", str(target), *options]
    if base_weights is not None:
        command += ["--weights", str(base_weights)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def _score(model: Model, cases: Sequence[TuningCase], **settings: Any) -> list[dict[str, Any]]:
    """Dice and lesion F1 of each scan, and Dice of the ventricles where they are labelled."""
    engine = WMHInferenceEngine(model)
    scores = []
    for case in cases:
        result = engine.segment(case.image, **settings)
        reference = read_reference(case, result.volume)
        measures = evaluate(reference, result.mask, result.volume.spacing_mm)
        row = {"scan": case.name, "dice": measures.dice, "lesion_f1": measures.lesion_f1}
        if labels := _ventricles(case):
            known = Volume.read(labels, allow_constant=True).data > 0
            found = result.structure_masks.get("ventricles")
            row["ventricles_dice"] = None if found is None else dice(known, found > 0)
        scores.append(row)
    return scores


def _ventricles(case: TuningCase) -> Path | None:
    """Mask of the ventricles beside that of the lesions, if there is one."""
    assert case.reference is not None
    path = case.reference.with_name(case.reference.name.replace("label-WMH", _VENTRICLES))
    return path if _VENTRICLES in path.name and path.is_file() else None


# --- the text ---------------------------------------------------------------------------------


def study_text(
    records: Sequence[Mapping[str, Any]],
    *,
    command: str,
    model: str,
    computer: Mapping[str, object],
    seen: int | None,
) -> str:
    """Write the study.

    Parameters
    ----------
    records : sequence of mapping
        From `Study.results`.
    command : str
        What was run.
    model : str
        Name of the base model.
    computer : mapping
        From `benchmarks.harness.machine`.
    seen : int or None
        Scans of the cohort that the base model was trained on; None where that is not known.
    """
    contestants = [name for name in _NAMES if any(r["contestant"] == name for r in records)]
    scores = {name: _by_scan(records, name, "dice") for name in contestants}
    scans = sorted(scores["base"])
    parts = [
        "# Study: few-shot adaptation",
        f"    {command}",
        f"Base model: {model}. {len(scans)} scans of one site; adapted on every other one, tested "
        "on the rest, and the other way round. Each test scan was seen by neither adapter nor "
        "threshold. " + _seen_text(seen, len(scans)),
        "## Dice on scans that were not adapted on",
        markdown_table(
            ["", "direction 1", "direction 2", "all", "lesion F1", "ventricles", "minutes", "MB"],
            [_row(records, name) for name in contestants],
        ),
        _gain_text(scores, scans),
        "`wmh-lora adapt` predicts its own worth by cross-validation within the scans that it "
        "learns from, before it has seen any test scan:",
        markdown_table(
            [
                "direction",
                "method",
                "base, cross-validated",
                "adapted, cross-validated",
                "steps of the folds",
            ],
            [
                [
                    str(r["direction"]),
                    r["contestant"],
                    f"{r['cross_validation']['base_dice']:.3f}",
                    f"{r['cross_validation']['adapted_dice']:.3f}",
                    ", ".join(str(fold["steps"]) for fold in r["cross_validation"]["folds"]),
                ]
                for r in records
                if "cross_validation" in r
            ],
        ),
        "## Every scan",
        markdown_table(
            ["scan", *contestants],
            [[scan, *(f"{scores[name][scan]:.3f}" for name in contestants)] for scan in scans],
        ),
        f"{computer['cores']} cores ({computer['cpu']}), {computer['threads']} threads, torch "
        f"{computer['torch']}; minutes are wall time with everything else that ran on them.",
    ]
    return "\n\n".join(parts) + "\n"


def _seen_text(seen: int | None, count: int) -> str:
    if seen is None:
        return "Whether the base model was trained on any of these scans was not checked."
    if seen == 0:
        return "The base model was trained on none of these scans."
    return (
        f"The base model was trained on {seen} of these {count} scans, so its own figures are not "
        "those of a new site, and what adaptation gains there is larger than what is seen here."
    )


def _by_scan(
    records: Sequence[Mapping[str, Any]], contestant: str, key: str, direction: int | None = None
) -> dict[str, float]:
    return {
        row["scan"]: row[key]
        for record in records
        if record["contestant"] == contestant and direction in (None, record["direction"])
        for row in record["scans"]
        if row.get(key) is not None
    }


def _row(records: Sequence[Mapping[str, Any]], contestant: str) -> list[str]:
    own = [record for record in records if record["contestant"] == contestant]

    def mean(key: str, direction: int | None = None) -> str:
        values = list(_by_scan(records, contestant, key, direction).values())
        return f"{np.mean(values):.3f}" if values else ""

    def largest(key: str, scale: float) -> str:
        values = [record[key] / scale for record in own if key in record]
        return f"{max(values):.1f}" if values else ""

    return [
        _NAMES[contestant],
        *(mean("dice", direction) for direction in (1, 2, None)),
        mean("lesion_f1"),
        mean("ventricles_dice"),
        largest("minutes", 1.0),
        largest("bytes", 1e6),
    ]


def _gain_text(scores: Mapping[str, Mapping[str, float]], scans: Sequence[str]) -> str:
    """Differences of the adapter from the others, scan by scan, with intervals."""
    lines = []
    for other in ("base", "tuned", "full"):
        if other in scores and "lora" in scores:
            gains = np.array([scores["lora"][scan] - scores[other][scan] for scan in scans])
            mean, (low, high) = mean_interval(gains)
            lines.append(
                f"- against {_NAMES[other]}: {mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f}),"
                f" better on {int((gains > 0).sum())} of {len(scans)} scans"
            )
    return "Dice of the adapter:\n\n" + "\n".join(lines)


def _scans_seen(cases: Sequence[TuningCase], training_files: Path) -> int:
    """Count the scans whose image is among the training files of a run's ``data.json``."""
    document = json.loads(training_files.read_text(encoding="utf-8"))
    known = set(document["training"].values())
    return sum(file_sha256(case.image) in known for case in cases)


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing of the study, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tabriz"))
    parser.add_argument("--model", default="default")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--work", type=Path, default=Path("runs/adapt-study"))
    parser.add_argument(
        "--training-files", type=Path, help="data.json of the run that trained the base model"
    )
    parser.add_argument("--markdown", type=Path, default=Path("docs/studies/adapt.md"))
    options = parser.parse_args(arguments)
    cases = cases_of_folders(options.data, options.data)
    model = model_path(options.model)
    study = Study(cases, model, options.weights, options.minutes, options.seed, options.work)
    records = study.results()
    seen = None if options.training_files is None else _scans_seen(cases, options.training_files)
    named = "" if options.model == "default" else " --model MODEL"
    text = study_text(
        records,
        command=f"python -m benchmarks.adapt{named} --minutes {options.minutes:g}",
        model=Base(model, options.weights, "lora").model().name,
        computer=machine(),
        seen=seen,
    )
    write_study(options.markdown, text)


if __name__ == "__main__":
    main()
