"""Kinds of network, each trained from the start for the same time on synthetic scans alone.

    python tools/build_synthetic_scans.py compact-synthetic -o SYNTHETIC --seed 5000
        --set data.root=PATH
    python -m benchmarks.architectures --synthetic SYNTHETIC [--data FOLDER] [--steps 600]

The first network is the packaged one and gets ``--steps`` steps; of the others, each gets as many
as take the same time, by steps timed in turns. Every other setting of the training is shared. All
are tested, in one plane, on scans of two scanners and on synthetic scans, none of which they have
seen. What is found in real scans depends on the threshold, so that of either scanner is chosen on
the other; in synthetic ones, which only rank the networks, it is each network's best.

What is finished is kept in ``--work``: after an interruption, the same command goes on. At the end
the study is written to ``docs/studies/architectures.md``; what stands there under "Reading" is
kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import (
    Timings,
    kept_result,
    machine,
    markdown_table,
    scan_identity,
    time_in_turns,
    write_study,
)
from benchmarks.training import training_step
from wmh_lora import __version__
from wmh_lora.config_reading import from_dict
from wmh_lora.data.dataset import TrainingStream
from wmh_lora.data.sources import DataConfig
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.evaluation.selection import mean_interval
from wmh_lora.evaluation.sweep import THRESHOLDS, sweep
from wmh_lora.files import file_sha256
from wmh_lora.models.allocator import keep_freed_memory
from wmh_lora.models.encoders import encoder_spec
from wmh_lora.models.registry import load_model
from wmh_lora.models.weights import resolve_base_weights
from wmh_lora.training.settings import RunConfig, read_run_config
from wmh_lora.training.tune import read_reference
from wmh_lora.training.tune_cases import TuningCase, cases_of_folders
from wmh_lora.volume import Volume

__all__ = ["ARCHITECTURES", "Architecture", "scores_of", "steps_in_equal_time", "study_text"]

FloatArray = NDArray[np.float64]

_MIN_VOXELS = 3
_MIN_SYNTHETIC_ML = 1.0  # Dice says little of less
_TURNS = 5
_COMPACT_RATES = dict.fromkeys(
    ("training.encoder_lr", "training.adapter_lr", "training.decoder_lr"), "3e-3"
)
_SHARED = {
    "training.seed": "61",
    "training.warmup_steps": "50",
    "training.threads": "2",
    "training.precision": "fp32",
    "training.validate_steps": "0",
    "data.real": "[]",
    "data.real_lanes": "0",
    "data.extracted_share": "0.3",
    "data.crops_per_scan": "48",
}


@dataclass(frozen=True)
class Architecture:
    """A training configuration, and what is changed of it."""

    config: str
    changes: Mapping[str, str]

    def overrides(self, steps: int) -> list[str]:
        """Return KEY=VALUE of all that is to be said beside the configuration's name."""
        values = {**_SHARED, "training.steps": str(steps), **self.changes}
        return [f"{key}={value}" for key, value in values.items()]


def _compact(**changes: str) -> Architecture:
    return Architecture("compact-synthetic", {**_COMPACT_RATES, **changes})


ARCHITECTURES = {
    "compact": _compact(),
    "compact without skip features": _compact(**{"model.decoder_skips": "false"}),
    "compact without neighbouring slices": _compact(**{"model.in_channels": "1"}),
    "compact, pixels of 1.25 mm": _compact(**{"preprocess.pixel_size_mm": "1.25"}),
    "LiteMedSAM with LoRA, pixels of 1.5 mm": Architecture("v1", {}),
}
"""What is compared, by name; the first is what the others are compared with."""


def steps_in_equal_time(timings: Timings, first_steps: int) -> dict[str, int]:
    """Give every network the steps that fit the time of the first one's.

    Parameters
    ----------
    timings : Timings
        Of one step of each, in turns.
    first_steps : int
        Of the first.
    """
    first = next(iter(timings.seconds))
    return {
        name: first_steps if name == first else round(first_steps * timings.ratio(first, name))
        for name in timings.seconds
    }


@dataclass(frozen=True)
class _Study:
    cohort: Sequence[TuningCase]
    other: TuningCase
    synthetic: Sequence[TuningCase]
    healthy: Path
    root: Path
    cache: Path
    work: Path
    first_steps: int

    def results(self) -> dict[str, dict[str, Any]]:
        """Train and score what is missing."""
        self.work.mkdir(parents=True, exist_ok=True)
        planned = {name: _identity(name, self.first_steps) for name in ARCHITECTURES}
        steps = kept_result(self.work / "steps.json", planned, self._steps)
        return {name: self._kept(name, steps[name]) for name in ARCHITECTURES}

    def _steps(self) -> dict[str, int]:
        keep_freed_memory()  # as training does
        torch.set_num_threads(int(_SHARED["training.threads"]))
        contestants = {
            name: training_step(read_run_config(each.config, each.overrides(self.first_steps)))
            for name, each in ARCHITECTURES.items()
        }
        return steps_in_equal_time(time_in_turns(contestants, _TURNS), self.first_steps)

    def _kept(self, name: str, steps: int) -> dict[str, Any]:
        file_name = name.replace(",", "").replace(" ", "-")
        sources = _sources(read_run_config(*self._config(name, steps)))
        training = {**_identity(name, steps), **sources}
        # an interrupted run is resumed, but not one of other settings or sources
        digest = hashlib.sha256(json.dumps(training).encode()).hexdigest()
        run = self.work / f"{file_name}-{digest[:8]}"
        tests = {
            "scans": scan_identity((*self.cohort, self.other, *self.synthetic)),
            "healthy_sha256": file_sha256(self.healthy),
        }
        result: dict[str, Any] = kept_result(
            self.work / f"{file_name}.json",
            {**training, **tests},
            partial(self._result, name, steps, run),
        )
        sys.stderr.write(f"{name}: {steps} steps\n")
        return result

    def _config(self, name: str, steps: int) -> tuple[str, list[str]]:
        """Name of a configuration, and KEY=VALUE of what is changed of it."""
        places = [f"data.root={self.root}", f"data.cache={self.cache}"]
        return ARCHITECTURES[name].config, [*ARCHITECTURES[name].overrides(steps), *places]

    def _result(self, name: str, steps: int, run: Path) -> dict[str, Any]:
        config, overrides = self._config(name, steps)
        command = [sys.executable, "-m", "wmh_lora", "train", config]
        for override in overrides:
            command += ["--set", override]
        if run.is_dir():
            command.append("--resume")
        subprocess.run([*command, "-o", str(run)], check=True, stdout=sys.stderr)
        model = load_model(run / "last.safetensors")
        engine = WMHInferenceEngine(model)
        return {
            "steps": steps,
            "parameters": sum(p.numel() for p in model.net.parameters()),
            "cohort": {case.name: _curve(engine, case).tolist() for case in self.cohort},
            "synthetic": {case.name: _curve(engine, case).tolist() for case in self.synthetic},
            "other": _curve(engine, self.other).tolist(),
            "healthy_ml": _volumes_ml(engine, self.healthy).tolist(),
        }


def _identity(name: str, steps: int) -> dict[str, Any]:
    """What a kept result must agree with."""
    architecture = ARCHITECTURES[name]
    return {
        "package_version": __version__,
        "config": architecture.config,
        "overrides": architecture.overrides(steps),
    }


def _sources(config: RunConfig) -> dict[str, Any]:
    """Checksums of what a network is trained from."""
    encoder, structures = config.model.encoder, config.model.structures
    data = from_dict(DataConfig, config.data)
    stream = TrainingStream(
        data, config.training.seed, config.training.crop, config.preprocess, structures
    )
    has_base = encoder_spec(encoder).load is not None
    return {
        "sources": [file_sha256(path) for path in stream.files()],
        "base_sha256": file_sha256(resolve_base_weights(encoder)) if has_base else "",
    }


def _probability(engine: WMHInferenceEngine, volume: Volume) -> NDArray[np.float32]:
    settings = engine.settings(planes="one", tta="none", zoom=1.0, min_contrast=0.0)
    return engine.predict_maps(engine.prepare(volume), settings, structures=False).probability


def _curve(engine: WMHInferenceEngine, case: TuningCase) -> FloatArray:
    """Dice of one scan at every threshold."""
    volume = Volume.read(case.image)
    found = sweep(
        _probability(engine, volume), read_reference(case, volume), THRESHOLDS, [_MIN_VOXELS]
    )
    return found["dice"][:, 0]


def _holds_enough(case: TuningCase) -> bool:
    volume = Volume.read(case.image)
    voxels = np.count_nonzero(read_reference(case, volume) == 1)
    return bool(voxels * volume.voxel_volume_ml >= _MIN_SYNTHETIC_ML)


def _volumes_ml(engine: WMHInferenceEngine, image: Path) -> FloatArray:
    """What is found in a scan at every threshold, small components included."""
    volume = Volume.read(image)
    probability = _probability(engine, volume)
    counts = [np.count_nonzero(probability >= threshold) for threshold in THRESHOLDS]
    return np.array(counts, np.float64) * volume.voxel_volume_ml


# --- the text ---------------------------------------------------------------------------------


def scores_of(result: Mapping[str, Any]) -> tuple[dict[str, float], float, float]:
    """Score a network, the threshold of each scanner chosen on the other.

    Parameters
    ----------
    result : mapping
        ``cohort`` (Dice of each scan), ``other`` and ``healthy_ml``, at every threshold.

    Returns
    -------
    cohort : dict
        Dice of each scan of the cohort, at the threshold that is best for the other scanner.
    other : float
        Dice of the other scanner's scan, at the threshold that is best for the cohort.
    healthy_ml : float
        At that threshold.
    """
    curves = np.array(list(result["cohort"].values()))
    for_cohort = int(np.argmax(result["other"]))
    for_other = int(np.argmax(curves.mean(axis=0)))
    cohort = {scan: float(curve[for_cohort]) for scan, curve in zip(result["cohort"], curves)}
    return cohort, float(result["other"][for_other]), float(result["healthy_ml"][for_other])


def _best(curves: Mapping[str, Sequence[float]]) -> FloatArray:
    """Dice of each scan at the threshold that is best for all together."""
    dice = np.array(list(curves.values()))
    best: FloatArray = dice[:, np.argmax(dice.mean(axis=0))]
    return best


def _gain(scores: FloatArray, base: FloatArray) -> str:
    mean, (low, high) = mean_interval(scores - base)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def study_text(
    results: Mapping[str, Mapping[str, Any]], *, command: str, computer: Mapping[str, object]
) -> str:
    """Write the study.

    Parameters
    ----------
    results : mapping
        By name, what `_Study` found: ``parameters``, ``steps``, and at every threshold the Dice of
        each scan of the ``cohort`` and of the ``synthetic`` ones, and ``other`` and ``healthy_ml``.
    command : str
        What was run.
    computer : mapping
        From `benchmarks.harness.machine`.
    """
    first = next(iter(results))
    base = np.array(list(scores_of(results[first])[0].values()))
    synthetic_base = _best(results[first]["synthetic"])
    rows = []
    for name, result in results.items():
        cohort, other, healthy_ml = scores_of(result)
        scores = np.array(list(cohort.values()))
        synthetic = _best(result["synthetic"])
        rows.append(
            [
                name,
                f"{result['parameters'] / 1e6:.1f}",
                str(result["steps"]),
                f"{scores.mean():.3f}",
                "" if name == first else _gain(scores, base),
                f"{_best(result['cohort']).mean():.3f}",
                f"{other:.3f}",
                f"{max(result['other']):.3f}",
                f"{healthy_ml:.1f}",
                f"{synthetic.mean():.3f}",
                "" if name == first else _gain(synthetic, synthetic_base),
            ]
        )
    parts = [
        "# Study: which network, at equal training time",
        f"    {command}",
        "Each network was trained from the start on synthetic scans alone, for the time that the "
        f"first takes for {results[first]['steps']} steps. The cohort is "
        f"{len(base)} scans of one scanner, the other scanner is one scan; no network has seen "
        "them, and each is seen in one plane. The threshold of either is the best of the other's; "
        f'"best" is the Dice at its own. {len(synthetic_base)} synthetic scans, drawn apart from '
        "those of the training, are judged at each network's best threshold. Intervals are those "
        "of the difference from the first network, scan by scan.",
        markdown_table(
            [
                "network",
                "parameters, M",
                "steps",
                "cohort, Dice",
                "gain (95 %)",
                "best",
                "other scanner",
                "best",
                "no lesion, mL",
                "synthetic",
                "gain (95 %)",
            ],
            rows,
        ),
        f"{computer['cores']} cores ({computer['cpu']}), {computer['threads']} threads, torch "
        f"{computer['torch']}.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing of the study, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("runs/anatomies"))
    parser.add_argument("--synthetic", type=Path, required=True, help="labelled synthetic scans")
    parser.add_argument("--steps", type=int, default=600, help="of the first network")
    parser.add_argument("--work", type=Path, default=Path("runs/architectures"))
    parser.add_argument("--markdown", type=Path, default=Path("docs/studies/architectures.md"))
    options = parser.parse_args(arguments)
    data = options.data.resolve()
    (other,) = cases_of_folders(data / "ljubljana", data / "ljubljana")
    synthetic = cases_of_folders(options.synthetic / "images", options.synthetic / "labels")
    study = _Study(
        cohort=cases_of_folders(data / "tabriz", data / "tabriz"),
        other=other,
        synthetic=[case for case in synthetic if _holds_enough(case)],
        healthy=data / "healthy" / "sub-01_FLAIR.nii.gz",
        root=data,
        cache=options.cache.resolve(),
        work=options.work,
        first_steps=options.steps,
    )
    text = study_text(
        study.results(),
        command=(
            "python tools/build_synthetic_scans.py compact-synthetic -o SYNTHETIC --seed 5000 "
            "--set data.root=PATH\n    "
            f"python -m benchmarks.architectures --synthetic SYNTHETIC --steps {options.steps}"
        ),
        computer=machine(),
    )
    write_study(options.markdown, text)


if __name__ == "__main__":
    main()
