"""How bright what a model finds, misses and finds falsely is beside the tissue around it.

    python -m benchmarks.contrast FLAIR.nii.gz MASK.nii.gz [--model NAME|FILE]
        [--slices 5 [--skip 2]] [--min-contrast 0] [--zoom 1]

Prints, as JSON, Dice and volumes, and of the voxels found by both, missed and false the 10th, 50th
and 90th percentile of their brightness over the normal tissue within 15 mm
(`wmh_lora.contrast.local_contrast`). False voxels fainter than what readers mark show that a
model takes haze for lesions; missed ones fainter than those found, that it is too strict. With
``--slices N`` the scan is first averaged over N slices along its last axis, as thick slices are,
and with ``--skip M`` the first M are left out, so that the cuts fall elsewhere.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import numpy.typing as npt

from wmh_lora.contrast import local_contrast
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.evaluation.metrics import dice
from wmh_lora.volume import Volume

PERCENTILES = (10, 50, 90)
CERTAINLY_NORMAL = 0.2
"""Probability of lesion below which brain counts as normal tissue."""


def main(arguments: list[str] | None = None) -> None:
    """Measure one scan and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("image")
    parser.add_argument("reference")
    parser.add_argument("--model", default="default")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--min-contrast", type=float)
    parser.add_argument("--zoom", type=float)
    options = parser.parse_args(arguments)
    scan = Volume.read(options.image)
    reference = (Volume.read(options.reference, allow_constant=True).data == 1).astype(np.float32)
    scan = thick_scan(without_first(scan, options.skip), options.slices)
    lesion = average_slices(reference[..., options.skip :], options.slices) >= 0.5
    engine = WMHInferenceEngine(load_model(options.model), "cpu")
    result = engine.segment(scan, min_contrast=options.min_contrast, zoom=options.zoom)
    found = result.mask > 0
    brain = result.structure_masks["brain"] > 0
    normal = brain & ~(result.structure_masks["ventricles"] > 0) & ~lesion
    normal &= result.probability < CERTAINLY_NORMAL
    through = int(np.argmax(scan.spacing_mm))
    contrast = local_contrast(scan.data, normal, scan.spacing_mm, through=through, smooth_mm=0.8)
    groups = {"found": found & lesion, "missed": lesion & ~found, "false": found & ~lesion}
    document = {
        "model": engine.model_description,
        "spacing_mm": [round(s, 2) for s in scan.spacing_mm],
        "min_contrast": result.settings["min_contrast"],
        "zoom": result.settings["zoom"],
        "dice": round(dice(lesion, found), 4),
        "percentiles": PERCENTILES,
        **{
            name: {
                "ml": round(float(voxels.sum()) * scan.voxel_volume_ml, 2),
                "contrast": _percentiles(contrast[voxels]),
            }
            for name, voxels in groups.items()
        },
    }
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def without_first(scan: Volume, count: int) -> Volume:
    """Cut a scan's first slices along its last axis."""
    affine = scan.affine.copy()
    affine[:3, 3] += count * affine[:3, 2]
    return Volume(np.ascontiguousarray(scan.data[..., count:]), affine)


def thick_scan(scan: Volume, count: int) -> Volume:
    """Average a scan over as many neighbouring slices along its last axis."""
    affine = scan.affine.copy()
    affine[:3, 3] += (count - 1) / 2 * affine[:3, 2]  # to the middle of the first slice
    affine[:3, 2] *= count
    return Volume(average_slices(scan.data, count), affine)


def average_slices(data: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """Return (I, J, K // count) means of as many neighbouring slices; what is left over is cut."""
    whole = data.shape[2] // count * count
    parts = data[..., :whole].reshape(*data.shape[:2], -1, count)
    return np.asarray(parts.mean(axis=-1), dtype=np.float32)


def _percentiles(values: npt.NDArray[np.float32]) -> list[float]:
    known = values[np.isfinite(values)]
    return [round(float(p), 3) for p in np.percentile(known, PERCENTILES)] if known.size else []


if __name__ == "__main__":
    main()
