"""Make a model's probabilities mean what they say, by scans that it has not been trained on.

    python tools/calibrate_model.py MODEL --images DIR --references DIR -o CALIBRATED
        [--json FILE] [--figure FILE.png]

Temperature and shift of the lesion's logit are fitted to the voxels of the brain, seen in one plane
and one view, and folded into the weights. Every second scan is left out of the fit; the figures
before and after are those of the scans left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.evaluation.calibration import Calibration, ProbabilityCounts, fit_calibration
from wmh_lora.models.model_edits import rescale_logits
from wmh_lora.training.tune import read_reference
from wmh_lora.training.tune_cases import cases_of_folders
from wmh_lora.volume import Volume


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    engine = WMHInferenceEngine(load_model(given.model), "cpu")
    settings = engine.settings(planes="one", tta="none", zoom=1.0)
    counts = []
    for case in cases_of_folders(given.images, given.references):
        volume = Volume.read(case.image)
        reference = read_reference(case, volume)
        maps = engine.predict_maps(engine.prepare(volume), settings)
        brain = maps.structure_masks["brain"] > 0
        counted = (brain | (reference == 1)) & (reference != 2)
        counts.append(ProbabilityCounts.of(maps.probability, reference == 1, counted))
    if len(counts) < 2:
        parser.error("One half of the scans is fitted, the other tested: give two or more.")
    fitted, kept = (_sum(counts[first::2]) for first in (0, 1))
    half = fit_calibration(fitted)
    whole = fit_calibration(fitted + kept)
    report = {
        "scans": len(counts),
        "before": _figures(kept, Calibration()),
        "after": _figures(kept, half),
        "fitted_on_half": asdict(half),
        "calibration": asdict(whole),
    }
    text = json.dumps(report, indent=2)
    sys.stdout.write(text + "\n")
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    if given.figure is not None:
        _draw(kept, half, given.figure)
    if given.output is not None:
        rescale_logits(
            given.model,
            given.output,
            "wmh",
            temperature=whole.temperature,
            shift=whole.shift,
            overwrite=True,
        )


def _sum(counts: Sequence[ProbabilityCounts]) -> ProbabilityCounts:
    return functools.reduce(operator.add, counts)


def _figures(counts: ProbabilityCounts, calibration: Calibration) -> dict[str, object]:
    return {
        "cross_entropy": counts.loss(calibration),
        "calibration_error": counts.calibration_error(calibration),
        "bins": [asdict(found) for found in counts.reliability(calibration)],
    }


def _draw(counts: ProbabilityCounts, calibration: Calibration, path: Path) -> None:
    """Draw the reliability diagram before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    shown = (("before", Calibration(), "o--", "0.45"), ("after", calibration, "s-", "0.0"))
    for label, correction, style, colour in shown:
        found = counts.reliability(correction)
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
