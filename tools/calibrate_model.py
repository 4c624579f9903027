"""Make a model's probabilities mean what they say, by scans that it has not been trained on.

    python tools/calibrate_model.py MODEL --images DIR --references DIR -o CALIBRATED
        [--json FILE] [--figure FILE.png]

Temperature and shift of the lesion's logit are fitted to what users get, by default settings, in
the voxels of the brain, and folded into the weights. Every second scan is left out of a first fit;
figures before and after are those of the scans left out, seen again with that correction in the
weights: looks are averaged after it. Thresholds and peak of the model are to be chosen anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.evaluation.calibration import Calibration, ProbabilityCounts, fit_calibration
from wmh_lora.models.model_edits import rescale_logits
from wmh_lora.models.registry import model_path
from wmh_lora.training.tune import read_reference
from wmh_lora.training.tune_cases import TuningCase, cases_of_folders
from wmh_lora.volume import Volume


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", help="a model file, or the name of a packaged model")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    cases = list(cases_of_folders(given.images, given.references))
    if len(cases) < 2:
        parser.error("One half of the scans is fitted, the other tested: give two or more.")
    model = model_path(given.model)
    fitted, kept = count_voxels(model, cases[::2]), count_voxels(model, cases[1::2])
    half = fit_calibration(fitted)
    whole = fit_calibration(fitted + kept)
    with tempfile.TemporaryDirectory() as folder:
        corrected = Path(folder) / "corrected.safetensors"
        write_corrected(model, corrected, half)
        after = count_voxels(corrected, cases[1::2])
    report = {
        "scans": len(cases),
        "before": _figures(kept),
        "after": _figures(after),
        "fitted_on_half": asdict(half),
        "calibration": asdict(whole),
    }
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    if given.figure is not None:
        _draw(kept, after, given.figure)
    if given.output is not None:
        write_corrected(model, given.output, whole)


def count_voxels(model: Path, cases: Sequence[TuningCase]) -> ProbabilityCounts:
    """Count probabilities in the brain, and what lies there beside it of the reference."""
    return functools.reduce(operator.add, _each_count(model, cases))


def _each_count(model: Path, cases: Sequence[TuningCase]) -> Iterable[ProbabilityCounts]:
    engine = WMHInferenceEngine(load_model(model), "cpu")
    for case in cases:
        volume = Volume.read(case.image)
        reference = read_reference(case, volume)
        maps = engine.predict_maps(engine.prepare(volume), engine.settings())
        brain = maps.structure_masks["brain"] > 0
        counted = (brain | (reference == 1)) & (reference != 2)
        yield ProbabilityCounts.of(maps.probability, reference == 1, counted)


def write_corrected(model: Path, target: Path, by: Calibration) -> None:
    """Write a model whose lesion logits are corrected."""
    rescale_logits(model, target, "wmh", temperature=by.temperature, shift=by.shift, overwrite=True)


def _figures(counts: ProbabilityCounts) -> dict[str, object]:
    return {
        "cross_entropy": counts.loss(),
        "calibration_error": counts.calibration_error(),
        "bins": [asdict(found) for found in counts.reliability()],
    }


def _draw(before: ProbabilityCounts, after: ProbabilityCounts, path: Path) -> None:
    """Draw the reliability diagram before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    shown = (("as trained", before, "o--", "0.45"), ("corrected", after, "s-", "0.0"))
    for label, counts, style, colour in shown:
        found = counts.reliability()
        axes.plot(
            [b.probability for b in found],
            [b.observed for b in found],
            style,
            color=colour,
            label=label,
            markersize=4,
        )
    axes.set(
        xlabel="probability of lesion", ylabel="share that is lesion", xlim=(0, 1), ylim=(0, 1)
    )
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_aspect("equal")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
