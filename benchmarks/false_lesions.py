"""Where a model finds lesions that readers do not mark, in a cohort with ventricles and brain.

    python -m benchmarks.false_lesions [--model NAME|FILE] [--data FOLDER]

Prints, as JSON, millilitres of false voxels a scan by where they lie: around a marked lesion (drawn
too wide), within 6 mm of the ventricles (normal caps, mostly), near the brain's surface or outside
it (cortex, scalp), and elsewhere. What readers mark as other pathology (label 2) counts neither as
marked nor as false. ``--data`` is a BIDS folder with masks of lesions, ventricles and brain; scans
that lack one are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.bids_folder import bids_images, bids_masks
from wmh_lora.data.sources import read_masks
from wmh_lora.data.synthesis import IGNORED
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.files import image_stem

NEEDED = ("wmh", "ventricles", "brain")
PLACES = ("around a lesion", "near the ventricles", "at the surface", "elsewhere")
FIGURES = ("marked", "found", *PLACES)
AROUND_PX = 2
NEAR_MM = 6.0
SURFACE_MM = 12.0

BoolArray = npt.NDArray[np.bool_]


def main(arguments: list[str] | None = None) -> None:
    """Segment the cohort and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tabriz"))
    parser.add_argument("--model", default="default")
    options = parser.parse_args(arguments)
    engine = WMHInferenceEngine(load_model(options.model), "cpu")
    scans = {}
    for image in bids_images(options.data):
        paths = dict(bids_masks(options.data, image))
        if not paths.keys() >= set(NEEDED):
            continue
        masks = read_masks(image, paths.items()).masks
        lesion, ventricles, brain = (masks[name] > 0 for name in NEEDED)
        result = engine.segment(image)
        voxel_ml = result.volume.voxel_volume_ml
        false = (result.mask > 0) & ~lesion & (masks[IGNORED] == 0)
        places = divide(false, lesion, ventricles, brain, result.volume.spacing_mm)
        counts = [lesion.sum(), result.volume_ml / voxel_ml, *(part.sum() for part in places)]
        scans[image_stem(image)] = {
            name: round(float(count) * voxel_ml, 2) for name, count in zip(FIGURES, counts)
        }
    mean = {
        name: round(float(np.mean([scan[name] for scan in scans.values()])), 2) for name in FIGURES
    }
    document = {"model": engine.model_description, "mean_ml": mean, "scans_ml": scans}
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def divide(
    false: BoolArray,
    lesion: BoolArray,
    ventricles: BoolArray,
    brain: BoolArray,
    spacing_mm: tuple[float, float, float],
) -> list[BoolArray]:
    """Divide false voxels (I, J, K) by `PLACES`, each by the first that fits.

    Slices lie along the longest side of a voxel; lesions are grown and the surface is measured
    within them.
    """
    across = [a == int(np.argmax(spacing_mm)) for a in range(3)]
    plane = np.ones([1 if a else 3 for a in across])
    around = ndimage.binary_dilation(lesion, plane, iterations=AROUND_PX)
    near = ndimage.distance_transform_edt(~ventricles, sampling=spacing_mm) <= NEAR_MM
    depth_mm = ndimage.distance_transform_edt(
        brain, sampling=[1e6 if a else s for a, s in zip(across, spacing_mm)]
    )
    parts = []
    left = false.copy()
    for place in (around, near, depth_mm < SURFACE_MM, np.ones_like(false)):
        parts.append(left & place)
        left &= ~place
    return parts


if __name__ == "__main__":
    main()
