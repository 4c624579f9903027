"""Label scans that nobody has labelled with a model, for training on (Lee, ICML workshop 2013).

    python tools/pseudo_label.py MODEL --images DIR -o DIR

Every FLAIR scan under ``--images`` becomes one subject of a BIDS folder that ``data.real`` of a
training file can name. Of the lesions, only what the model is sure of is labelled: components that
reach ``--sure`` are lesions (1), what is below ``--doubt`` is background (0), and the rest is
neither (2), which training ignores. Of those components, what is faint beside the scan's other
lesions is judged as in synthetic scans (`wmh_lora.data.visibility`). Nothing outside the brain that
the model outlines is a lesion. Brain and ventricles are labelled as it outlines them, where that is
plausible (`wmh_lora.structures`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wmh_lora.data.visibility import judge_visibility
from wmh_lora.engine import WMHInferenceEngine, load_model
from wmh_lora.evaluation.masks import OTHER_PATHOLOGY_LABEL
from wmh_lora.postprocess import apply_threshold, remove_faint_components
from wmh_lora.structures import find_brain, find_ventricles
from wmh_lora.volume import Volume, write_nifti

NEAR_BRAIN_MM = 3.0
"""How far outside the outlined brain a lesion may lie: outlines err by that much."""


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sure", type=float, default=0.85)
    parser.add_argument("--doubt", type=float, default=0.1)
    given = parser.parse_args()
    engine = WMHInferenceEngine(load_model(given.model), "cpu")
    settings = engine.settings(tta="flip", adaptive=False)
    images = sorted(given.images.rglob("*_FLAIR.nii.gz"))
    for number, image in enumerate(images, start=1):
        volume = Volume.read(image)
        maps = engine.predict_maps(engine.prepare(volume), settings)
        brain = maps.structure_masks["brain"] > 0
        near = _grow(brain, volume.spacing_mm)
        threshold = settings.threshold_of(maps.looks.planes)
        labels = pseudo_labels(maps.probability, near, threshold, given.sure, given.doubt)
        normal = (
            brain & ~(maps.structure_masks["ventricles"] > 0) & (maps.probability < given.doubt)
        )
        labels = without_faint(labels, volume, normal)
        subject = f"sub-{number:02}"
        scan = given.output / subject / "anat" / f"{subject}_FLAIR.nii.gz"
        mask = given.output / "derivatives" / "manual" / subject / "anat"
        for folder in (scan.parent, mask):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(image, scan)
        drawn = {"WMH": labels, **plausible_structures(maps.structure_masks, volume)}
        for label, data in drawn.items():
            name = f"{subject}_space-orig_label-{label}_mask.nii.gz"
            write_nifti(mask / name, data, volume, overwrite=True)
        lesion_ml, open_ml = (
            int((labels == value).sum()) * volume.voxel_volume_ml
            for value in (1, OTHER_PATHOLOGY_LABEL)
        )
        sys.stdout.write(
            f"{subject} {image.name}: lesions {lesion_ml:.2f} mL, open {open_ml:.2f} mL\n"
        )


def pseudo_labels(
    probability: npt.NDArray[np.floating],
    brain: npt.NDArray[np.bool_],
    threshold: float,
    sure: float,
    doubt: float,
) -> npt.NDArray[np.uint8]:
    """Return (I, J, K) 1 for a certain lesion, 2 where neither is certain, 0 for background."""
    inside = np.where(brain, probability, 0.0).astype(probability.dtype)
    lesion = remove_faint_components(apply_threshold(inside, threshold), inside, sure)
    unsure = apply_threshold(inside, doubt) & ~lesion.astype(np.bool_)
    return np.where(unsure, np.uint8(OTHER_PATHOLOGY_LABEL), lesion)


def plausible_structures(
    structure_masks: Mapping[str, npt.NDArray[np.uint8]], volume: Volume
) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the (I, J, K) masks of brain and ventricles that can be used, by name."""
    brain = find_brain(structure_masks, volume.affine)
    found = {
        "brain": brain,
        "ventricles": find_ventricles(structure_masks, volume.affine, brain.mask),
    }
    return {
        name: structure.mask.astype(np.uint8)
        for name, structure in found.items()
        if structure.mask is not None
    }


def without_faint(
    labels: npt.NDArray[np.uint8], volume: Volume, normal: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Take lesions back that are hardly brighter than normal tissue beside the scan's others."""
    lesion = labels == 1
    image = volume.finite_data()
    visible, doubtful = judge_visibility(image, lesion, normal, volume.spacing_mm)
    judged = np.where(lesion & ~visible, np.uint8(0), labels)
    judged[doubtful] = OTHER_PATHOLOGY_LABEL
    return judged


def _grow(
    mask: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> npt.NDArray[np.bool_]:
    distance_mm = ndimage.distance_transform_edt(~mask, sampling=spacing_mm)
    return np.asarray(distance_mm <= NEAR_BRAIN_MM)


if __name__ == "__main__":
    main()
