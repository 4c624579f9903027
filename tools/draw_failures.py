"""Draw the scans that a model gets most wrong, for its model card.

    python tools/draw_failures.py MODEL --images DIR --references DIR -o FILE.png [--count 4]

Segments every scan with the model's settings and draws, for each of those with the lowest Dice, the
slice with the most errors; the last row is the scan without lesions in which most was found.
Pictures of people's scans are not for publication: give synthetic ones
(``tools/build_synthetic_scans.py``).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.evaluation.masks import challenge_masks
from wmh_lora.evaluation.metrics import dice
from wmh_lora.files import image_stem
from wmh_lora.report.error_maps import Example, example_slice, predictions_grid
from wmh_lora.training.tune import read_reference
from wmh_lora.training.tune_cases import TuningCase, cases_of_folders
from wmh_lora.volume import Volume

LEAST_ML = 1.0
"""References with less do not make a Dice worth ranking by."""


@dataclass(frozen=True)
class Outcome:
    """What was found in a scan, against what is there."""

    dice: float
    reference_ml: float
    found_ml: float
    example: Example


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--references", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=4)
    given = parser.parse_args()
    engine = WMHInferenceEngine(load_model(given.model), "cpu")
    outcomes = []
    for case in cases_of_folders(given.images, given.references):
        outcomes.append(judge(engine, case))
        sys.stdout.write(f"{outcomes[-1].example.title}\n")
    figure = predictions_grid([o.example for o in worst(outcomes, given.count)])
    figure.savefig(given.output, dpi=110, bbox_inches="tight")


def judge(engine: WMHInferenceEngine, case: TuningCase) -> Outcome:
    """Segment one scan, and compare it with its reference."""
    volume = Volume.read(case.image)
    found = engine.segment(volume).mask
    masks = challenge_masks(read_reference(case, volume), found)
    score = dice(*masks)
    reference_ml, found_ml = (float(m.sum()) * volume.voxel_volume_ml for m in masks)
    name = image_stem(case.image)
    title = f"{name}: Dice {score:.2f}, {found_ml:.1f} mL found of {reference_ml:.1f}"
    return Outcome(
        score, reference_ml, found_ml, example_slice(title, volume, *masks, most="errors")
    )


def worst(outcomes: list[Outcome], count: int) -> list[Outcome]:
    """Choose the lowest Dice, and of scans without lesions the one with most found."""
    with_lesions = [o for o in outcomes if o.reference_ml >= LEAST_ML]
    without = [o for o in outcomes if o.reference_ml == 0.0]
    chosen = sorted(with_lesions, key=lambda o: o.dice)[: count - bool(without)]
    return chosen + sorted(without, key=lambda o: -o.found_ml)[:1]


if __name__ == "__main__":
    main()
