"""Shift the logits of ventricles and brain until their masks agree best with labelled scans.

    python tools/balance_structures.py MODEL --data BIDS -o BALANCED [--shifts 0 0.25 0.5 ...]

A network that learned from soft borders and few voxels may draw a structure too small or too large
at a probability of one half. One shift a structure is chosen by mean Dice with the manual masks of
the BIDS folder (``derivatives/manual``) and folded into the weights; the lesions stay as they are,
but for what depends on the brain's border.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from wmh_lora.data.bids_folder import bids_images, bids_masks
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.evaluation.metrics import dice
from wmh_lora.models.model_edits import rescale_logits
from wmh_lora.volume import Volume

STRUCTURES = ("ventricles", "brain")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--shifts", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1.0, 1.5])
    given = parser.parse_args()
    means = {}
    for shift in given.shifts:
        with tempfile.TemporaryDirectory() as folder:
            shifted = Path(folder) / "shifted.safetensors"
            write_shifted(given.model, shifted, dict.fromkeys(STRUCTURES, shift))
            means[shift] = agreement(shifted, given.data)
        told = ", ".join(f"{name} {value:.3f}" for name, value in means[shift].items())
        sys.stdout.write(f"shift {shift:g}: {told}\n")
    best = {name: max(means, key=lambda shift: means[shift][name]) for name in STRUCTURES}
    write_shifted(given.model, given.output, best)
    sys.stdout.write(f"chosen: {best}\n")


def write_shifted(model: Path, target: Path, shifts: dict[str, float]) -> None:
    """Write a model whose logits of each structure are higher by its shift."""
    for name, shift in shifts.items():
        rescale_logits(model, target, name, temperature=1.0, shift=shift, overwrite=True)
        model = target


def agreement(model: Path, data: Path) -> dict[str, float]:
    """Mean Dice of each structure over the scans that have a manual mask of it."""
    engine = WMHInferenceEngine(load_model(model), "cpu")
    settings = engine.settings(planes="one", tta="none", zoom=1.0)
    scores: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    for image in bids_images(data):
        volume = Volume.read(image)
        maps = engine.predict_maps(engine.prepare(volume), settings)
        for name, path in bids_masks(data, image):
            if name in scores:
                reference = Volume.read(path, allow_constant=True).data > 0
                scores[name].append(dice(reference, maps.structure_masks[name] > 0))
    return {name: float(np.mean(found)) for name, found in scores.items()}


if __name__ == "__main__":
    main()
